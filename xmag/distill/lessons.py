"""Teacher features as distillation targets, computed online or cached."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xmag.distill.augment import Draws, map_tokens
from xmag.distill.targets import KeptTargets, TargetSettings
from xmag.distill.teachers import Teacher
from xmag.distill.views import LOW_MPP, LOW_PX, SIDE, teacher_tiles
from xmag.errors import InputError
from xmag.geometry import TileSpec

Numbers = NDArray[np.int64]


@runtime_checkable
class Lesson(Protocol):
    """Protocol of a source of teacher features (targets) for regions."""

    @property
    def name(self) -> str:
        """The teacher's name in logs and checkpoints."""
        ...

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """Identity of the teacher (and cache), as plain JSON values."""
        ...

    @property
    def weight(self) -> float:
        """Weight of the teacher's losses."""
        ...

    @property
    def sees_pixels(self) -> bool:
        """Whether `targets` needs the augmented high views."""
        ...

    @property
    def variants(self) -> TargetSettings | None:
        """Settings of cached augmented variants; None where any augmentation will do."""
        ...

    def knows(self, regions: Numbers) -> NDArray[np.bool_]:
        """Mask of the regions that have targets: bool (B,)."""
        ...

    def targets(
        self, regions: Numbers, draws: Draws, high: Tensor | None, variants: Numbers
    ) -> Tensor:
        """Targets of augmented regions: (B, 16, dim), 0 for a region without targets.

        float32 or float16, on any device. `high` are the augmented high views, where `sees_pixels`;
        `variants` (B,) are the indices of cached variants, where it has `variants`.
        """
        ...

    def check(self, student: TileSpec) -> None:
        """Raise InputError where a student of this tile specification cannot use the targets."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineLesson:
    """Online teacher: computes the features of every augmented view."""

    teacher: Teacher
    weight: float = 1.0

    @property
    def name(self) -> str:
        """The teacher's name."""
        return self.teacher.name

    @property
    def dim(self) -> int:
        """Length of the teacher's feature vectors."""
        return self.teacher.dim

    @property
    def identity(self) -> Mapping[str, Any]:
        """The teacher's identity, as plain JSON values."""
        return self.teacher.identity

    @property
    def sees_pixels(self) -> bool:
        """True: the teacher computes features of pixels."""
        return True

    @property
    def variants(self) -> TargetSettings | None:
        """None: any augmentation will do."""
        return None

    def knows(self, regions: Numbers) -> NDArray[np.bool_]:
        """Mask of the regions that have targets: all, bool (B,)."""
        return np.ones(len(regions), np.bool_)

    def targets(
        self,
        regions: Numbers,  # noqa: ARG002 (it looks at the pixels)
        draws: Draws,  # noqa: ARG002
        high: Tensor | None,
        variants: Numbers,  # noqa: ARG002
    ) -> Tensor:
        """Compute the features of the 16 tiles of each view in `high`: float32 (B, 16, dim)."""
        assert high is not None
        features = self.teacher.features(teacher_tiles(high)).float()
        return features.view(len(high), SIDE**2, self.dim)

    def check(self, student: TileSpec) -> None:
        """Raise InputError where a tile of the student is not 4 x 4 of the teacher's."""
        seen = self.teacher.tile_spec
        if seen.size_px != student.size_px or abs(seen.mpp * SIDE / student.mpp - 1) > 1e-6:
            raise InputError(
                f"the teacher {self.name} sees {seen.size_px} px at {seen.mpp:g} µm/px and the"
                f" student {student.size_px} px at {student.mpp:g} µm/px; expected the same px at"
                f" {SIDE} times the µm/px, so that a tile of the student is {SIDE} x {SIDE} of the"
                " teacher's"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptLesson:
    """Cached teacher features; see `keep_targets`.

    Features of unaugmented regions ("plain") are flipped and turned with the student's image, but
    do not follow its colour jitter. Those of augmented variants go with images augmented likewise,
    all variants in turn.
    """

    kept: KeptTargets
    weight: float = 1.0

    @property
    def name(self) -> str:
        """The teacher's name."""
        return str(self.kept.provenance.fingerprint["teacher"]["name"])

    @property
    def dim(self) -> int:
        """Length of the teacher's feature vectors."""
        return self.kept.dim

    @property
    def identity(self) -> Mapping[str, Any]:
        """Identity of the teacher, and settings of the cache, as plain JSON values."""
        found = self.kept.provenance.to_dict()["fingerprint"]
        return {**found["teacher"], "kept": found["kept"]}

    @property
    def sees_pixels(self) -> bool:
        """False: the features are cached, so no pixels are needed."""
        return False

    @property
    def variants(self) -> TargetSettings | None:
        """Settings of cached augmented variants; None where the features are plain."""
        return self.kept.settings if self.kept.augmented else None

    def knows(self, regions: Numbers) -> NDArray[np.bool_]:
        """Mask of the regions that were not damaged when features were computed: bool (B,)."""
        return np.asarray(self.kept.good[regions])

    def targets(
        self,
        regions: Numbers,
        draws: Draws,
        high: Tensor | None,  # noqa: ARG002 (its features are computed)
        variants: Numbers,
    ) -> Tensor:
        """Cached features, flipped and turned by `draws` if plain: float16 (B, 16, dim), CPU."""
        known = self.knows(regions)
        chosen = variants[known] if self.kept.augmented else 0
        result = torch.zeros(len(regions), SIDE**2, self.dim, dtype=torch.float16)
        result[torch.from_numpy(known)] = self.kept.features(regions[known], chosen)
        if self.kept.augmented:
            return result
        grid = result.view(len(regions), SIDE, SIDE, self.dim)
        return map_tokens(grid, draws).reshape(result.shape)

    def check(self, student: TileSpec) -> None:
        """Raise InputError where the student's tiles are not the low views of regions."""
        if (student.size_px, student.mpp) != (LOW_PX, LOW_MPP):
            raise InputError(
                f"the student's tiles are {student.size_px} px at {student.mpp:g} µm/px, and the"
                f" kept features of {self.name} go with {LOW_PX} px at {LOW_MPP:g} µm/px; expected"
                " a student of such tiles"
            )


def check_lessons(lessons: Sequence[Lesson], student: TileSpec) -> None:
    """Raise InputError where teachers are incompatible with each other, or with the student."""
    names = [lesson.name for lesson in lessons]
    if not names or len(set(names)) < len(names):
        raise InputError(
            f"the teachers are {names}; expected at least one, and a name of its own for each"
        )
    for lesson in lessons:
        lesson.check(student)
    drawn = {lesson.name: lesson.variants for lesson in lessons if lesson.variants is not None}
    if len({json.dumps({**v.to_dict(), "low": False}) for v in drawn.values()}) > 1:
        raise InputError(
            f"the teachers {sorted(drawn)} were kept for different augmentations; expected the same"
            " variants, seed and augmentation, since all teachers look at the same image"
        )
