"""docs/features.md does what it says: its code, run in order."""

import importlib.util
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from support.slides import write_svs

from xmag.bag import FeatureBag
from xmag.geometry import TileGeometry
from xmag.provenance import Provenance, mixing_fingerprint

_PAGE = Path(__file__).parents[1] / "docs" / "features.md"
_SIZE = (1000, 900)
_WITH_WSIDATA = importlib.util.find_spec("wsidata") is not None


def _save(path: str, mpp: float) -> None:
    fingerprint = mixing_fingerprint(
        weights_sha256="ab" * 32, tile_spec={"mpp": mpp}, plan={"overlap": 0}, dtype="float32"
    )
    tiles = TileGeometry(
        size_px=224, mpp=mpp, size_level0=896, overlap_px=0, level0_mpp=0.5, level0_size=_SIZE
    )
    features, coords = np.ones((3, 4), np.float32), np.array([[0, 0], [1, 0], [0, 1]])
    FeatureBag(features, coords, Provenance(fingerprint, {}), tiles).save(path)


@pytest.mark.filterwarnings(  # of anndata and spatialdata
    "ignore:The 'future.infer_string' option",
    "ignore:zarr v3 autosharding",
    "ignore:Call to deprecated class Scaler",
)
def test_the_code_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _save("slide.h5", 2.0)
    _save("other.h5", 1.0)
    write_svs(tmp_path / "slide.svs", size=_SIZE, mpp=0.5, power=20)
    blocks = re.findall(r"^```python\n(.*?)^```", _PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 7

    names: dict[str, object] = {}
    for block in blocks:
        if "wsidata" in block and not _WITH_WSIDATA:
            continue  # run where that is installed
        exec(compile(block, _PAGE.name, "exec"), names)
    assert names["side"] == 896
    assert "# " + capsys.readouterr().out.strip() in blocks[-1]
    assert {path.name for path in tmp_path.iterdir()} - {"slide.zarr"} == {
        "slide.h5", "slide.safetensors", "slide.pt", "slide-stamp.h5", "other.h5", "slide.svs",
        "slide.h5ad",
    }  # fmt: skip


def test_the_tables_name_all_there_is(tmp_path: Path) -> None:
    _save(str(tmp_path / "slide.h5"), 2.0)
    named = set(re.findall(r"`(\w+)`", _PAGE.read_text(encoding="utf-8")))

    with h5py.File(tmp_path / "slide.h5") as file:
        assert set(file) | set(file.attrs) | set(file["coords"].attrs) <= named
    provenance = FeatureBag.load(tmp_path / "slide.h5").provenance
    assert provenance is not None
    assert set(provenance.fingerprint) <= named
