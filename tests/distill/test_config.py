"""What a configuration file may say, and how it is told what it may not."""

import re
import tomllib
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from xmag.distill.export import Card
from xmag.distill.settings import (
    DataConfig,
    DistillConfig,
    LoaderSettings,
    LogSettings,
    LossSettings,
    Settings,
    StudentConfig,
    TeacherConfig,
    TrainSettings,
    read_config,
)
from xmag.errors import InputError
from xmag.training.augmentation import Augmentation
from xmag.vit import ViTConfig

EXAMPLE = Path(__file__).parents[2] / "examples" / "distill.toml"
LEAST = """
out = "run"
[data]
slides = "slides"
[[teachers]]
name = "teacher"
[student]
config = "dinov2_vitb14"
"""
SECTIONS = {
    "data": DataConfig,
    "teachers": TeacherConfig,
    "student": StudentConfig,
    "loss": LossSettings,
    "augment": Augmentation,
    "train": TrainSettings,
    "loader": LoaderSettings,
    "log": LogSettings,
    "model": Card,
}


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return path


def test_the_least_config_has_all_defaults(tmp_path: Path) -> None:
    config = read_config(written(tmp_path, LEAST))
    assert config.settings == Settings()
    assert config.data == DataConfig(slides="slides")
    assert config.teachers == [TeacherConfig(name="teacher")]
    assert (config.model, config.out) == (Card(), "run")


def test_the_defaults_are_the_papers_but_for_its_mistakes_and_a_stronger_jitter() -> None:
    train, loss, augment = TrainSettings(), LossSettings(), Augmentation()
    assert (train.lr, train.weight_decay, train.clip, train.epochs) == (5e-4, 0.05, 1.0, 10)
    assert (train.batch, train.views, train.ema) == (48, 2, 0.999)
    assert (loss.global_weight, loss.local_weight, loss.cosine) == (1.0, 0.5, 1.0)
    assert (augment.flips, augment.turns, augment.jitter, augment.hue) == (True, False, 1.0, 0.05)
    assert (augment.brightness, augment.contrast, augment.saturation) == (0.2,) * 3
    assert train.schedule == "cosine"


def test_values_reach_their_places(tmp_path: Path) -> None:
    text = (
        LEAST.replace('"dinov2_vitb14"', "{ width = 32, depth = 2, heads = 2, hidden = 64 }")
        .replace('slides = "slides"', 'slides = ["a.svs", "b.svs"]\nregions = 30')
        .replace('name = "teacher"', 'name = "teacher"\nweight = 2\nkeep = "plain"')
    )
    text += "[train]\nlr = 1\nsteps = 7\nema_ramp = false\n"
    text += "[augment]\nturns = false\n[loss]\ncentre = true\n"
    config = read_config(written(tmp_path, text))
    assert config.data.slides == ["a.svs", "b.svs"]
    assert config.data.regions == 30
    assert config.teachers[0].weight == 2.0
    assert isinstance(config.teachers[0].weight, float)
    assert config.student.config == ViTConfig(width=32, depth=2, heads=2, hidden=64)
    assert (config.train.lr, config.train.steps, config.train.ema_ramp) == (1.0, 7, False)
    assert not config.augment.turns
    assert config.loss.centre


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[student]", "[student]\nlayerscale = 0.1", r"student\.layerscale .* 'layer_scale'\?"),
        ("[student]", "[trian]\n[student]", r"trian is no known key; did you mean 'train'\?"),
        ("[student]", "[train]\nzzz = 1\n[student]", r"train\.zzz .*expected one of \['batch'"),
        ("name =", "nmae =", r"teachers\[0\]\.nmae .*'name'"),
        ('name = "teacher"', "weight = 1", r"teachers\[0\]\.name is missing"),
        ('out = "run"', "", "out is missing"),
        ("[student]", "[train]\nlr = '1'\n[student]", r"train\.lr is '1'; expected a number"),
        ("[student]", "[train]\nbatch = 1.5\n[student]", r"train\.batch is 1\.5; expected a whole"),
        ("[student]", "[train]\nbatch = true\n[student]", r"train\.batch is True; expected a"),
        ("[student]", "[train]\nsteps = 'x'\n[student]", r"train\.steps is 'x'; expected a whole"),
        ("[student]", "[loss]\ncentre = 1\n[student]", r"loss\.centre is 1; expected true or"),
        ("[student]", "loss = 1\n[student]", r"teachers\[0\]\.loss"),
        ('"slides"', "3", r"data\.slides is 3; expected a text or a list of texts"),
        ('"teacher"', '"t"\nkeep = "some"', r"keep is 'some'; expected one of 'no', 'plain'"),
        ("[student]", "[train]\nlr = -1\n[student]", r"train\.lr is -1\.0; expected a positive"),
        ("[student]", "[train]\nema = 1\n[student]", r"train\.ema is 1\.0; expected .*\[0, 1\)"),
        ("[student]", "[train]\nwarmup = 1\n[student]", r"train\.warmup"),
        ("[student]", '[train]\nschedule = "step"\n[student]', r"is 'step'; expected 'cosine'"),
        ("[student]", '[train]\nschedule = "paper"\n[student]', r"never decayed.*\"cosine\""),
        ('"teacher"', '"t"\nkeep = "augmented"', r"is gone: .*unaugmented.*expected \"plain\""),
        ('"teacher"', '"t"\nvariants = 4', r"variants .*went with keep = \"augmented\": .*Delete"),
        ("[student]", "[loss]\ncosine = 0\n[student]", "the loss is 0"),
        ("[student]", "[loss]\nstandardise = true\n[student]", r"without loss\.centre"),
        ("[student]", '[student]\nresample = "box"', r"resample is 'box'; expected one of"),
        ("[student]", "[log]\nevery = 0\n[student]", r"log\.every is 0"),
        ('slides = "slides"', "", "expected one of the two"),
        ('slides = "slides"', 'images = "x"', "images need both"),
        ('config = "dinov2_vitb14"', "", "both missing"),
        ('out = "run"', "out = ", "is no TOML"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in LEAST
    with pytest.raises(InputError, match=message):
        read_config(written(tmp_path, LEAST.replace(old, new, 1)))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_config(tmp_path / "none.toml")


def test_the_example_has_every_key_with_its_default() -> None:
    text = EXAMPLE.read_text()
    values = tomllib.loads(text)
    read_config(EXAMPLE)
    assert values.keys() == {field.name for field in fields(DistillConfig)}
    for section, kind in SECTIONS.items():
        table: dict[str, Any] = values[section]
        if section == "teachers":
            table = values[section][0]
        for field in fields(kind):
            if field.name in table:
                if field.default is not MISSING and field.default is not None:
                    assert table[field.name] == field.default, (section, field.name)
            else:  # a default of None is a comment
                assert field.default is None, (section, field.name)
                assert re.search(rf"^# {field.name} = ", text, re.MULTILINE), (section, field.name)
