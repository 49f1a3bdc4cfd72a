"""Cross-magnification distillation: a student at 2.0 µm/px learns what teachers see at 0.5.

Regions of slides are read once (`plan_slides`, `SlideRegions`) and seen twice: by teachers as 4 x 4
tiles (`load_teacher`, `keep_targets`), by the student as one. `distill` trains and exports it;
`run_config` does all of it as a TOML file says.

    views        a region's two views; augment: the same change for both
    manifest     which regions of which slides; sampling makes one, sources read it
    teachers     tiles -> features; targets and keeping: features computed once
    lessons      what teachers say; curriculum: of a batch of regions that loader has read
    losses       the objective; heads, student: what it is computed of
    step         one step; session: many; training: a whole run
    checkpoint, record, validation, export: what a run leaves
    config, settings, run, needs, summary: the configuration file, and what it comes to
"""

from xmag.distill.augment import Augmentation
from xmag.distill.config import DistillConfig, read_config
from xmag.distill.export import Card, export_student, push_to_hub
from xmag.distill.keeping import keep_targets
from xmag.distill.lessons import KeptLesson, Lesson, OnlineLesson
from xmag.distill.losses import block_means, global_loss, local_loss
from xmag.distill.manifest import Manifest, held_out
from xmag.distill.run import run_config
from xmag.distill.sampling import plan_images, plan_slides
from xmag.distill.settings import (
    LoaderSettings,
    LogSettings,
    LossSettings,
    Settings,
    TrainSettings,
)
from xmag.distill.sources import RegionSource, SlideRegions
from xmag.distill.student import StudentStart, fresh_student, pretrained_student
from xmag.distill.summary import Needs, Summary
from xmag.distill.targets import KeptTargets, TargetSettings
from xmag.distill.teachers import Teacher, WeightedTeacher, load_teacher
from xmag.distill.training import distill

__all__ = [
    "Augmentation",
    "Card",
    "DistillConfig",
    "KeptLesson",
    "KeptTargets",
    "Lesson",
    "LoaderSettings",
    "LogSettings",
    "LossSettings",
    "Manifest",
    "Needs",
    "OnlineLesson",
    "RegionSource",
    "Settings",
    "SlideRegions",
    "StudentStart",
    "Summary",
    "TargetSettings",
    "Teacher",
    "TrainSettings",
    "WeightedTeacher",
    "block_means",
    "distill",
    "export_student",
    "fresh_student",
    "global_loss",
    "held_out",
    "keep_targets",
    "load_teacher",
    "local_loss",
    "plan_images",
    "plan_slides",
    "pretrained_student",
    "push_to_hub",
    "read_config",
    "run_config",
]
