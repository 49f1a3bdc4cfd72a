"""The exported folder, as load_model and a reader see it, and the way to the Hub."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.distilling import STUDENT, TILE_PX, tiny_student
from support.hub_server import FakeHub
from support.hub_server import serve as serve_models
from support.programs import run_program
from support.upload_server import UploadHub, serve

import xmag
from xmag.distill.export import Card, export_student, push_to_hub
from xmag.distill.student import student_config
from xmag.errors import InputError, OutputError

MADE_BY = {
    "settings": {"train": {"batch": 48, "views": 2, "ema": 0.999}},
    "total_steps": 10,
    "student": {"name": None, "seed": 0},
    "teachers": [{"name": "MahmoodLab/UNI2-h", "weight": 1.0, "weights_sha256": "ab" * 32}],
    "data": {
        "slides": 12, "regions_per_site": {"a": 1500, "b": 300},
        "training_regions": 1800, "validation_regions": 100,
    },
    "results": {
        "steps": 10, "damaged_regions": 3,
        "validation": {"cosine/global/MahmoodLab/UNI2-h": 0.61},
        "untrained": {"cosine/global/MahmoodLab/UNI2-h": 0.02},
    },
}  # fmt: skip
CONFIG = student_config(STUDENT)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    vit = tiny_student(seed=4).vit
    card = Card(name="our-model", terms="CC-BY-NC-ND 4.0", license="cc-by-nc-nd-4.0")
    export_student(tmp_path / "model", vit, CONFIG, made_by=MADE_BY, card=card)
    return tmp_path / "model"


def test_load_model_reads_what_was_exported(exported: Path) -> None:
    encoder = xmag.load_model(exported, device="cpu")
    assert encoder.tile_spec == xmag.TileSpec(mpp=2.0, size_px=TILE_PX, resample="lanczos")
    assert encoder.provenance["terms"] == "CC-BY-NC-ND 4.0"
    assert encoder.provenance["config_source"] == "read"
    assert encoder.provenance["trained"]
    tiles = np.random.default_rng(0).integers(0, 256, (2, TILE_PX, TILE_PX, 3), np.uint8)
    vit = tiny_student(seed=4).vit
    images = torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(rgb).view(3, 1, 1) for rgb in (CONFIG.mean, CONFIG.std))
    with torch.no_grad():
        expected = vit((images - mean) / std)[:, 0]
    torch.testing.assert_close(encoder.embed(tiles), expected, atol=1e-5, rtol=1e-5)


def test_the_card_says_what_the_model_was_made_of(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    for fact in (
        "license: cc-by-nc-nd-4.0", "# our-model", "56 px at 2 µm/px, resampled by `lanczos`",
        "MahmoodLab/UNI2-h, weight 1", "1,800 regions of 224 px at 0.5 µm/px from 12 slides",
        "(a 1,500, b 300)", "100 more were held out. 3 were damaged",
        "| cosine/global/MahmoodLab/UNI2-h | 0.020 | 0.610 |", "began from | random weights",
    ):  # fmt: skip
        assert fact in card, fact
    made_by = json.loads((exported / "distillation.json").read_text())
    assert made_by["teachers"] == MADE_BY["teachers"]
    assert made_by["xmag"] == xmag.__version__


def test_what_is_exported_is_a_copy(tmp_path: Path) -> None:
    vit = tiny_student().vit
    encoder = export_student(tmp_path, vit, CONFIG, made_by=MADE_BY)
    with torch.no_grad():
        vit.norm.weight.fill_(7)
    assert float(encoder.vit.norm.weight[0]) == 1.0
    assert vit.norm.weight.requires_grad


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        export_student(tmp_path / "file" / "model", tiny_student().vit, CONFIG, made_by=MADE_BY)


PUSH = """
import sys
from xmag.distill.export import push_to_hub
print(push_to_hub(sys.argv[1], "someone/our-model"))
"""


def test_a_model_is_pushed_to_the_hub_and_loaded_from_it(exported: Path, tmp_path: Path) -> None:
    (exported / "notes.txt").write_text("not to be uploaded")
    with serve(UploadHub()) as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": hub.token}
        settings["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        address = run_program(PUSH, exported, **settings)
        again = run_program(PUSH, exported, **settings)
    assert address == again == f"{hub.url}/someone/our-model/commit/{'d' * 40}\n"
    files = hub.repos["someone/our-model"]
    assert files.keys() == {"model.safetensors", "config.json", "README.md", "distillation.json"}
    for name, content in files.items():
        assert content == (exported / name).read_bytes()
    assert hub.private["someone/our-model"]
    assert hub.messages == ["Upload a model distilled with xmag"] * 2

    load = """
    import sys, xmag
    encoder = xmag.load_model("someone/our-model", device="cpu")
    print(encoder.tile_spec.resample, encoder.embed_dim)
    """
    with serve_models(FakeHub(repos={"someone/our-model": files})) as models:
        loaded = run_program(load, HF_ENDPOINT=models.url, HF_HOME=str(tmp_path))
    assert loaded == "lanczos 32\n"


FAILING = """
import sys
from xmag.distill.export import push_to_hub
from xmag.errors import HubError
try:
    push_to_hub(sys.argv[1], "someone/our-model")
except HubError as error:
    print(error)
"""


def test_a_hub_that_refuses_or_fails_is_explained(exported: Path, tmp_path: Path) -> None:
    with serve(UploadHub()) as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
        refused = run_program(FAILING, exported, HF_TOKEN="hf_read", **settings)
        hub.status = 400
        failed = run_program(FAILING, exported, HF_TOKEN=hub.token, **settings)
    gone = run_program(FAILING, exported, HF_TOKEN=hub.token, **settings)
    assert "(HTTP 401)" in refused
    assert "token that may write" in refused
    assert "cannot be uploaded" in failed
    assert "Nothing was committed" in failed
    assert "cannot be uploaded" in gone


def test_a_folder_that_is_no_exported_model_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"lacks model\.safetensors, config\.json, README\.md"):
        push_to_hub(tmp_path / "nothing", "a/b")
    (exported / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"lacks config\.json of format"):
        push_to_hub(exported, "a/b")


def test_a_name_that_the_hub_does_not_allow_is_refused(exported: Path) -> None:
    with pytest.raises(InputError, match="no name that the Hub allows"):
        push_to_hub(exported, "no spaces please")
