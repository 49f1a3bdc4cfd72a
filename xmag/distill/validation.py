"""Validation: cosine similarity of the student to its teachers on held-out regions."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812 (the name that every torch reader knows)
from torch import Tensor

from xmag.distill.losses import BLOCKS
from xmag.distill.ranks import summed
from xmag.distill.step import Trainer
from xmag.distill.student import Student

_AT_ONCE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationSet:
    """Validation set: this rank's share of the held-out regions, in host memory.

    `low` is uint8 (N, S, S, 3), `targets` hold each teacher's features, float32 (N, 16, Dt).
    """

    low: Tensor
    targets: Sequence[Tensor]

    @classmethod
    def of(
        cls, parts: Iterable[tuple[Tensor, Sequence[Tensor]]], *, dims: Sequence[int]
    ) -> "ValidationSet":
        """Concatenate batches; `dims` are the widths of the teachers, for a rank without any."""
        lows: list[Tensor] = []
        targets: list[list[Tensor]] = [
            [torch.empty(0, BLOCKS**2, dim, dtype=torch.float32)] for dim in dims
        ]
        for low, found in parts:
            lows.append(low.cpu())
            for kept, target in zip(targets, found, strict=True):
                kept.append(target.cpu())
        low = torch.cat(lows) if lows else torch.empty(0, dtype=torch.uint8)
        return cls(low=low, targets=[torch.cat(kept) for kept in targets])


def validate(
    trainer: Trainer, held: ValidationSet, *, names: Sequence[str], centres: Sequence[Tensor | None]
) -> dict[str, float]:
    """Mean cosine similarities of the EMA student to each teacher, over all ranks.

    "cosine/global/NAME" and "cosine/local/NAME" compare as the loss does (with the teacher's mean
    subtracted, where that is trained); "centred_cosine/..." subtracts, on both sides, the mean over
    these very regions, so that only what tells them apart counts. A student with the same output
    for every region has a centred cosine of 0.
    """
    result = {}
    projected = _projections(trainer, held)
    for at, name in enumerate(names):
        target, centre = held.targets[at].to(trainer.device), centres[at]
        shift = 0 if centre is None else centre.to(trainer.device)
        levels = {
            "global": (projected[at][0], target.mean(1)),
            "local": (projected[at][1], target),
        }
        for level, (projection, teacher) in levels.items():
            if projection is None:
                continue
            ours, theirs = projection.flatten(0, -2), teacher.flatten(0, -2)
            centred = (ours - _mean(ours), theirs - _mean(theirs))
            result[f"cosine/{level}/{name}"] = _mean_cosine(ours, theirs - shift)
            result[f"centred_cosine/{level}/{name}"] = _mean_cosine(*centred)
    return result


@torch.no_grad()
def _projections(
    trainer: Trainer, held: ValidationSet
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Projections of all regions for each teacher, concatenated: (region, tiles)."""
    student = cast(Student, trainer.ema.module)
    if not len(held.low):  # all of this rank's are damaged; the others wait for its sums
        nothing = [target.to(trainer.device) for target in held.targets]
        return [
            (n[:, 0] if student.global_heads else None, n if student.local_heads else None)
            for n in nothing
        ]
    parts: list[list[tuple[Tensor | None, Tensor | None]]] = []
    for low in torch.split(held.low, _AT_ONCE):
        with trainer.autocast():
            found = student(low.to(trainer.device))
        parts.append([(each.region, each.tiles) for each in found])

    def whole(teacher: int, level: int) -> Tensor | None:
        found = [part[teacher][level] for part in parts]
        return None if found[0] is None else torch.cat([p for p in found if p is not None])

    return [(whole(at, 0), whole(at, 1)) for at in range(len(held.targets))]


def _mean(rows: Tensor) -> Tensor:
    """Mean of the rows of all ranks."""
    total = summed(torch.cat((rows.sum(0), rows.new_tensor([len(rows)]))))
    return total[:-1] / total[-1]


def _mean_cosine(ours: Tensor, theirs: Tensor) -> float:
    return float(_mean(F.cosine_similarity(ours, theirs, dim=-1)[:, None]))


def chunks(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Consecutive chunks of at most `size` rows."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
