"""Cross-magnification distillation: a student at 2.0 µm/px learns teacher features at 0.5 µm/px.

Regions of slides are read once (`plan_slides`, `SlideRegions`) and seen twice: by teachers as 4 x 4
tiles (`load_teacher`, `cache_features`), by the student as one. `distill` trains and exports it;
`run_config` does all of it as a TOML file says.

    views        the high and low view of a region; augment: the same augmentation for both
    manifest     the list of training regions; sampling draws it, sources read its pixels
    loader       threads that read batches of regions ahead; order: the sampler of an epoch
    teachers     models from tiles to features; targets, keeping: the cache of features
    lessons      teacher targets, computed online or cached; curriculum: augmented batches of them
    student      the ViT and its projection heads (heads); losses: the objective
    step         one optimizer step; session: many; training: a whole run
    checkpoint, record (metrics logger), validation, export: outputs of a run
    config, settings, run, needs (dry-run estimates), summary: a run from a TOML file
"""

from xmag.distill.cache import (
    CachedFeatures,
    CacheSettings,
    FeatureCache,
    cache_features,
)
from xmag.distill.dataset import RegionSource, SlideRegions
from xmag.distill.export import Card, export_student, push_to_hub
from xmag.distill.losses import block_means, global_loss, local_loss
from xmag.distill.regions import Manifest, held_out, plan_images, plan_slides
from xmag.distill.run import distill, run_config
from xmag.distill.settings import (
    DistillConfig,
    LoaderSettings,
    LogSettings,
    LossSettings,
    Settings,
    TrainSettings,
    read_config,
)
from xmag.distill.student import StudentStart, fresh_student, pretrained_student
from xmag.distill.summary import Estimate, Summary
from xmag.distill.teachers import OnlineFeatures, Teacher, TeacherFeatures, load_teacher
from xmag.training.augmentation import Augmentation

# The names of version 1.
Lesson, KeptLesson = TeacherFeatures, CachedFeatures
OnlineLesson = WeightedTeacher = OnlineFeatures
KeptTargets, TargetSettings, keep_targets = FeatureCache, CacheSettings, cache_features

__all__ = [
    "Augmentation",
    "CacheSettings",
    "CachedFeatures",
    "Card",
    "DistillConfig",
    "Estimate",
    "FeatureCache",
    "LoaderSettings",
    "LogSettings",
    "LossSettings",
    "Manifest",
    "OnlineFeatures",
    "RegionSource",
    "Settings",
    "SlideRegions",
    "StudentStart",
    "Summary",
    "Teacher",
    "TeacherFeatures",
    "TrainSettings",
    "block_means",
    "cache_features",
    "distill",
    "export_student",
    "fresh_student",
    "global_loss",
    "held_out",
    "load_teacher",
    "local_loss",
    "plan_images",
    "plan_slides",
    "pretrained_student",
    "push_to_hub",
    "read_config",
    "run_config",
]
