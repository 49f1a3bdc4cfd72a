"""Cross-magnification distillation: a student at 2.0 µm/px learns teacher features at 0.5 µm/px.

Regions of slides are read once and seen twice: by teachers as 4 x 4 tiles, by the student as one.
`distill` trains the student and exports it; `run_config` does all of it as a TOML file says.

    regions      the training regions, sampled from slides into a manifest
    dataset      the pixels of regions, the sampler of an epoch, the loader that reads ahead
    views        the high and the low view of a region
    teachers     models from tiles to features; cache: features computed once, and kept
    student      the ViT and its projection heads; losses: global and local distances
    settings     all settings, and the TOML file
    trainer      micro-batches of augmented views, steps, validation, checkpoints
    run          a whole run, and its dry run; summary: its metrics, estimate and summary
    export       the model folder, its card, and the way to the Hub
"""

# Of those that are not in __all__ the documentation tells where they live; they stay importable.
from xmag.distill.cache import CachedFeatures, CacheSettings, FeatureCache, cache_features
from xmag.distill.dataset import RegionSource, SlideRegions
from xmag.distill.export import Card, export_student, push_to_hub  # noqa: F401
from xmag.distill.losses import block_means, global_loss, local_loss  # noqa: F401
from xmag.distill.regions import Manifest, held_out, plan_images, plan_slides
from xmag.distill.run import distill, run_config
from xmag.distill.settings import (
    DistillConfig,  # noqa: F401
    LoaderSettings,  # noqa: F401
    LogSettings,  # noqa: F401
    LossSettings,
    Settings,
    TrainSettings,
    read_config,  # noqa: F401
)
from xmag.distill.student import StudentStart, fresh_student, pretrained_student  # noqa: F401
from xmag.distill.summary import Estimate, Summary  # noqa: F401
from xmag.distill.teachers import OnlineFeatures, Teacher, TeacherFeatures, load_teacher
from xmag.training import Augmentation  # noqa: F401

# Names of version 1 that its documentation used.
KeptLesson, KeptTargets, TargetSettings = CachedFeatures, FeatureCache, CacheSettings
Lesson, OnlineLesson, WeightedTeacher = TeacherFeatures, OnlineFeatures, OnlineFeatures
Needs, keep_targets = Estimate, cache_features

__all__ = [
    "CacheSettings",
    "CachedFeatures",
    "LossSettings",
    "Manifest",
    "OnlineFeatures",
    "RegionSource",
    "Settings",
    "SlideRegions",
    "Teacher",
    "TrainSettings",
    "cache_features",
    "distill",
    "fresh_student",
    "held_out",
    "load_teacher",
    "plan_images",
    "plan_slides",
    "pretrained_student",
    "push_to_hub",
    "run_config",
]


def __dir__() -> list[str]:
    return sorted(__all__)
