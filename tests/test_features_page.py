"""docs/features.md does what it says: its code, run in order."""

import re
from pathlib import Path

import h5py
import numpy as np
import pytest

from xmag.bag import FeatureBag
from xmag.geometry import TileGeometry
from xmag.provenance import Provenance, mixing_fingerprint

_PAGE = Path(__file__).parents[1] / "docs" / "features.md"


def _save(path: str, mpp: float) -> None:
    fingerprint = mixing_fingerprint(
        weights_sha256="ab" * 32, tile_spec={"mpp": mpp}, plan={"overlap": 0}, dtype="float32"
    )
    tiles = TileGeometry(
        size_px=224, mpp=mpp, size_level0=896, overlap_px=0, level0_mpp=0.5, level0_size=(9, 9)
    )
    features = np.ones((3, 4), np.float32)
    FeatureBag(features, np.zeros((3, 2)), Provenance(fingerprint, {}), tiles).save(path)


def test_the_code_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _save("slide.h5", 2.0)
    _save("other.h5", 1.0)
    blocks = re.findall(r"^```python\n(.*?)^```", _PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 5

    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, _PAGE.name, "exec"), names)
    assert names["side"] == 896
    assert "# " + capsys.readouterr().out.strip() in blocks[-1]
    assert {path.name for path in tmp_path.iterdir()} == {
        "slide.h5", "slide.safetensors", "slide.pt", "slide-stamp.h5", "other.h5",
    }  # fmt: skip


def test_the_tables_name_all_there_is(tmp_path: Path) -> None:
    _save(str(tmp_path / "slide.h5"), 2.0)
    named = set(re.findall(r"`(\w+)`", _PAGE.read_text(encoding="utf-8")))

    with h5py.File(tmp_path / "slide.h5") as file:
        assert set(file) | set(file.attrs) | set(file["coords"].attrs) <= named
    provenance = FeatureBag.load(tmp_path / "slide.h5").provenance
    assert provenance is not None
    assert set(provenance.fingerprint) <= named
