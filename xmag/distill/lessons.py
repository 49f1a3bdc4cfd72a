"""What teachers say of regions: asked on the way, or computed before and kept."""

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
    """What one teacher says of regions."""

    @property
    def name(self) -> str:
        """What the teacher is called in records."""
        ...

    @property
    def dim(self) -> int:
        """The length of its features."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """What tells it from others, as plain JSON values."""
        ...

    @property
    def weight(self) -> float:
        """How much its losses count."""
        ...

    @property
    def sees_pixels(self) -> bool:
        """Whether it needs the augmented high views."""
        ...

    @property
    def variants(self) -> TargetSettings | None:
        """The augmentations that its features were kept for, where it has no others."""
        ...

    def knows(self, regions: Numbers) -> NDArray[np.bool_]:
        """Which of the regions it has something to say of: bool (B,)."""
        ...

    def targets(
        self, regions: Numbers, draws: Draws, high: Tensor | None, variants: Numbers
    ) -> Tensor:
        """The features of augmented regions: (B, 16, dim), 0 where it knows nothing.

        They are float32 or float16, wherever they are.

        `high` are the augmented high views, for a lesson that sees pixels; `variants` (B,) are the
        numbers of the kept augmentations, for one that has `variants`.
        """
        ...

    def check(self, student: TileSpec) -> None:
        """Raise InputError where a student of this tile specification cannot learn from it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineLesson:
    """A teacher that looks at every augmented region, each time anew."""

    teacher: Teacher
    weight: float = 1.0

    @property
    def name(self) -> str:
        """The teacher's."""
        return self.teacher.name

    @property
    def dim(self) -> int:
        """The teacher's."""
        return self.teacher.dim

    @property
    def identity(self) -> Mapping[str, Any]:
        """The teacher's."""
        return self.teacher.identity

    @property
    def sees_pixels(self) -> bool:
        """It does."""
        return True

    @property
    def variants(self) -> TargetSettings | None:
        """None: it takes any augmentation."""
        return None

    def knows(self, regions: Numbers) -> NDArray[np.bool_]:
        """All of them."""
        return np.ones(len(regions), np.bool_)

    def targets(
        self,
        regions: Numbers,  # noqa: ARG002 (it looks at the pixels)
        draws: Draws,  # noqa: ARG002
        high: Tensor | None,
        variants: Numbers,  # noqa: ARG002
    ) -> Tensor:
        """The features of the 16 tiles of `high`: float32 (B, 16, dim)."""
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
    """Features that were computed once and kept; see `keep_targets`.

    Those of regions as they are ("plain") are flipped and turned with the student's image, whose
    colours change without them. Those of augmented variants go with images changed likewise, all
    variants in turn.
    """

    kept: KeptTargets
    weight: float = 1.0

    @property
    def name(self) -> str:
        """The teacher's."""
        return str(self.kept.provenance.fingerprint["teacher"]["name"])

    @property
    def dim(self) -> int:
        """The teacher's."""
        return self.kept.dim

    @property
    def identity(self) -> Mapping[str, Any]:
        """The teacher's, and what was kept."""
        found = json.loads(self.kept.provenance.to_json())["fingerprint"]
        return {**found["teacher"], "kept": found["kept"]}

    @property
    def sees_pixels(self) -> bool:
        """It does not: it has seen them."""
        return False

    @property
    def variants(self) -> TargetSettings | None:
        """The settings of kept augmented variants; None where any flip and turn will do."""
        return self.kept.settings if self.kept.augmented else None

    def knows(self, regions: Numbers) -> NDArray[np.bool_]:
        """Those that could be decoded when the features were computed."""
        return np.asarray(self.kept.good[regions])

    def targets(
        self,
        regions: Numbers,
        draws: Draws,
        high: Tensor | None,  # noqa: ARG002 (its features are computed)
        variants: Numbers,
    ) -> Tensor:
        """The kept features, as augmented: float16 (B, 16, dim), on the CPU."""
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
    """Raise InputError where lessons do not go together, or not with the student."""
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
