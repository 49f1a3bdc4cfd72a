"""From slides and a file to a model: what the command line does."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.distilling import colourful_regions
from support.models import TINY, random_vit
from support.slides import texture, write_svs

import xmag
from xmag.cli import main
from xmag.distill.dataset import SlideRegions
from xmag.distill.regions import Manifest
from xmag.distill.run import run_config
from xmag.encoder import Encoder
from xmag.errors import InputError, MismatchError, SlideScaleError
from xmag.hub.registry import ModelConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIG = """
out = "run"
[data]
slides = "slides"
min_tissue = 0.0
hold_out = 0.3
[[teachers]]
name = "teacher"
[student]
config = { width = 32, depth = 2, heads = 2, hidden = 64, position_grid = 16 }
[train]
steps = 4
batch = 4
views = 1
lr = 4e-3
ema = 0.9
[loader]
threads = 1
[log]
tensorboard = false
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with slides at 0.5 µm/px of two sites, and a small teacher for that scale."""
    folder = tmp_path_factory.mktemp("distill")
    for number, site in enumerate(("a", "a", "b")):
        (folder / "slides" / site).mkdir(parents=True, exist_ok=True)
        cells = colourful_regions(4, side=896, seed=number)
        pixels = np.concatenate(
            [np.concatenate(list(row), 1) for row in cells.reshape(2, 2, 896, 896, 3)]
        )
        path = folder / "slides" / site / f"{number}.svs"
        write_svs(path, mpp=0.5, power=20, levels=(1, 4), pixels=pixels)
    about = {"name": "teacher", "terms": "none", "trained": True}
    config = ModelConfig(vit=TINY, tile_spec=xmag.TileSpec(mpp=0.5))
    (folder / "teacher").mkdir()
    Encoder(random_vit(TINY), config, provenance=about).save(folder / "teacher")
    return folder


def config_of(folder: Path, out: Path, text: str = CONFIG) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    text = text.replace('"run"', f'"{out / "run"}"').replace('"slides"', f'"{folder / "slides"}"')
    path = out / "config.toml"
    path.write_text(text.replace('"teacher"', f'"{folder / "teacher"}"'))
    return path


def test_a_student_is_distilled_from_slides(folder: Path, tmp_path: Path) -> None:
    """And knows of slides it has not seen what it did not know untrained."""
    text = CONFIG.replace("steps = 4", "steps = 60").replace(
        "[log]",
        "[loss]\ncentre = true\n"
        "[augment]\nbrightness = 0.05\ncontrast = 0.05\nsaturation = 0.05\n[log]",
    )
    text = text.replace('"teacher"', '"teacher"\nkeep = "plain"\nkeep_low = true')
    summary = run_config(config_of(folder, tmp_path, text), progress=False)
    assert summary.regions == 8
    for level in ("global", "local"):
        name = f"centred_cosine/{level}/teacher"
        assert summary.validation[name] > summary.untrained[name] + 0.2
    encoder = xmag.load_model(tmp_path / "run" / "model", device="cpu")
    assert encoder.tile_spec.resample == "lanczos"
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "8 regions of 896 px at 0.5 µm/px from 3 slides (a 8, b 4)" in card
    assert str(tmp_path) not in (tmp_path / "run" / "model" / "distillation.json").read_text()
    again = run_config(config_of(folder, tmp_path, text), progress=False)
    assert again.validation == summary.validation


def test_the_command_says_what_it_would_do_and_then_does_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(folder, tmp_path)
    assert main(["distill", str(config), "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert "site 'a': 2 slides, 8 regions" in planned
    assert "nothing was written" in planned
    assert list(tmp_path.iterdir()) == [config]
    assert main(["distill", str(config)]) == 0
    assert str(tmp_path / "run" / "model") in capsys.readouterr().out
    assert xmag.load_model(tmp_path / "run" / "model", device="cpu").embed_dim == 32


def test_the_students_kernel_is_that_of_its_low_views_and_of_its_model(
    folder: Path, tmp_path: Path
) -> None:
    text = CONFIG.replace('"teacher"', '"teacher"\nkeep = "plain"\nkeep_low = true')
    text = text.replace("[student]", '[student]\nresample = "area"')
    text = text.replace("[log]", "[loss]\ncentre = true\nstandardise = true\n[log]")
    text = text.replace("position_grid = 16 }", 'position_grid = 16, pooling = "token+mean" }')
    run_config(config_of(folder, tmp_path, text), progress=False)
    encoder = xmag.load_model(tmp_path / "run" / "model", device="cpu")
    assert (encoder.tile_spec.resample, encoder.pooling) == ("area", "token+mean")
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "| embedding | 64-d, the class token and the mean of the patch tokens after" in card
    (low,) = (tmp_path / "run" / "targets").glob("*/low-*.npy")
    manifest = Manifest.load(tmp_path / "run" / "manifest.json")
    with SlideRegions(manifest, folder / "slides") as source:
        pixels = source.read(range(len(manifest)))
    reduced = [np.asarray(Image.fromarray(image).reduce(4)) for image in pixels]
    assert np.array_equal(np.load(low), np.stack(reduced))


@pytest.mark.parametrize("keep", ["no", "plain"])
def test_teachers_are_asked_or_cached(folder: Path, tmp_path: Path, keep: str) -> None:
    text = CONFIG.replace('"teacher"', f'"teacher"\nkeep = "{keep}"')
    summary = run_config(config_of(folder, tmp_path, text), progress=False)
    assert summary.steps == 4
    assert np.isfinite(list(summary.validation.values())).all()
    assert (tmp_path / "run" / "targets").exists() == (keep != "no")
    lines = "\n".join(summary.lines())
    assert "site 'b': 1 slides, 4 regions" in lines
    assert "held out  cosine/global/teacher" in lines


@pytest.mark.parametrize("keep", ["no", "plain"])
def test_a_dry_run_estimates_the_run_and_writes_nothing(
    folder: Path, tmp_path: Path, keep: str
) -> None:
    text = CONFIG.replace('"teacher"', f'"teacher"\nkeep = "{keep}"')
    path = config_of(folder, tmp_path, text)
    before = sorted(p for root in (folder, tmp_path) for p in root.rglob("*"))
    summary = run_config(path, dry_run=True, progress=False)
    assert sorted(p for root in (folder, tmp_path) for p in root.rglob("*")) == before
    estimate = summary.estimate
    assert estimate is not None
    assert (summary.steps, summary.regions, summary.model) == (4, 8, None)
    vit = 32 * (3 * 14 * 14 + 1) + 257 * 32 + 32 + 2 * 32  # patches, positions, class, norm
    block = 4 * 32 + 32 * 96 + 96 + 32 * 32 + 32 + 2 * 32 * 64 + 64 + 32 + 2 * 32
    assert estimate.student_parameters == vit + 2 * block
    assert estimate.head_parameters == 2 * (2 * 32 * 32 + 2 * 32 + 2 * 32)
    total = estimate.student_parameters + estimate.head_parameters
    assert estimate.state_bytes["moments"] == 2 * 4 * total
    # At least the tokens that each block reads, and no more than some forty such.
    tokens = 4 * 257 * 32 * 4
    assert 4 * tokens < estimate.activation_bytes < 80 * tokens
    assert estimate.seconds_per_step > 0
    assert (estimate.cache_seconds > 0) == (keep == "plain")
    assert summary.seconds == pytest.approx(estimate.cache_seconds + 4 * estimate.seconds_per_step)
    assert summary.lines()[-1] == "dry run   nothing was written"


def test_the_example_makes_a_model(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "slides").mkdir(exist_ok=True)
        path = tmp_path / "slides" / f"{name}.svs"
        write_svs(path, mpp=0.5, power=20, levels=(1, 16), pixels=texture(900, 900, seed=ord(name)))
    command = [
        sys.executable, EXAMPLES / "distill.py", tmp_path / "slides", tmp_path / "out",
        "--teacher", folder / "teacher", "--student", "xmag_mini",
        "--steps", "1", "--batch", "1",
    ]  # fmt: skip
    done = subprocess.run(command, check=True, timeout=800, stdout=subprocess.PIPE, text=True)
    assert "model     " in done.stdout
    encoder = xmag.load_model(tmp_path / "out" / "model", device="cpu")
    assert (encoder.embed_dim, encoder.tile_spec.mpp) == (192, 2.0)


def test_a_changed_sample_is_refused(folder: Path, tmp_path: Path) -> None:
    run_config(config_of(folder, tmp_path), progress=False)
    text = CONFIG.replace("hold_out", "regions = 6\nhold_out")
    with pytest.raises(MismatchError, match="regions: None there, 6 here"):
        run_config(config_of(folder, tmp_path, text), progress=False)


def test_a_slide_without_detail_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "coarse").mkdir()
    write_svs(tmp_path / "coarse" / "x.svs", mpp=1.0, power=10, size=(1000, 1000), levels=(1,))
    text = CONFIG.replace('"slides"', f'"{tmp_path / "coarse"}"')
    with pytest.raises(SlideScaleError, match="never upsampled"):
        run_config(config_of(folder, tmp_path, text), progress=False)


def test_a_teacher_for_another_scale_is_refused(folder: Path, tmp_path: Path) -> None:
    text = CONFIG.replace('"teacher"', '"xmag-mini"')
    with pytest.raises(InputError, match="xmag-mini wants tiles of 224 px at 2 µm/px"):
        run_config(config_of(folder, tmp_path, text), progress=False)


def test_a_student_for_another_scale_is_refused(folder: Path, tmp_path: Path) -> None:
    text = CONFIG.replace("[student]", f'[student]\nweights = "{folder / "teacher"}"')
    text = "\n".join(line for line in text.splitlines() if not line.startswith("config ="))
    with pytest.raises(InputError, match=r"the student's tiles are at 0\.5 µm/px; expected 2"):
        run_config(config_of(folder, tmp_path, text), progress=False)
