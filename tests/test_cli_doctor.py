"""The command doctor."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import constants, file_download
from support.hub_server import FakeHub, serve

import xmag
from xmag import devices
from xmag.cli import doctor, main
from xmag.hub.registry import DEFAULT_MODEL

CPUINFO = """processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8481C
flags\t\t: fpu vme {flags} sse4_2
"""


def test_doctor_tells_of_everything_and_its_remedies_without_a_network(tmp_path):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "xmag", "doctor"], capture_output=True, text=True,
        encoding="utf-8", env=env, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"xmag      {xmag.__version__}, Python 3.")
    labels = [line.split()[0] for line in lines if line[0] != " "]
    for label in ("packages", "extras", "CPU", "dtype", "memory", "torch", "CUDA", "speed"):
        assert label in labels
    (place,) = (n for n, line in enumerate(lines) if line.startswith("weights"))
    assert lines[place].endswith("is not in the cache, and HF_HUB_OFFLINE is set")
    assert lines[place + 1].startswith("          -> unset HF_HUB_OFFLINE")
    assert "xmag-mini" in lines[-1]


def test_without_a_torch_that_can_be_imported_that_is_the_last_line():
    code = (
        "import sys\nfrom xmag.cli import main\n"
        "sys.modules['torch'] = None\nsys.exit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    fault, remedy = done.stdout.splitlines()[-2:]
    assert fault.startswith("torch     cannot be imported: ")
    assert remedy.startswith("          -> install torch again")


def test_the_first_line_comes_before_anything_heavy_is_loaded():
    code = (
        "import sys\nfrom xmag.cli import main\n"
        "class Tap:\n"
        "    encoding = 'utf-8'\n"
        "    def write(self, text):\n"
        "        heavy = [m for m in ('torch', 'numpy', 'h5py') if m in sys.modules]\n"
        "        sys.__stdout__.write(text + str(heavy)); raise SystemExit\n"
        "    def flush(self):\n        pass\n"
        "sys.stdout = Tap()\nmain(['doctor'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, heavy = done.stdout.splitlines()
    assert first.startswith("xmag      ")
    assert heavy == "[]"


@pytest.mark.parametrize(
    ("flags", "units", "pays"),
    [
        ("amx_tile amx_bf16 avx512_bf16", "AMX-BF16, AVX512-BF16", "is about three times as fast"),
        ("avx512f avx512_bf16", "AVX512-BF16", "may be faster"),
        ("avx2", "no units for bfloat16", ""),
    ],
)
def test_the_dtype_that_pays_is_told_by_the_units_of_the_cpu(flags, units, pays):
    about, dtype = doctor.cpu(CPUINFO.format(flags=flags))
    assert about.value.startswith("Intel(R) Xeon(R) Platinum 8481C, ")
    assert about.value.endswith(f"to use; {units}")
    assert bool(dtype.remedy) == bool(pays)
    assert pays in dtype.remedy


def test_a_cpu_that_is_not_described_is_none_with_units():
    about, dtype = doctor.cpu("")
    assert about.value.endswith("no units for bfloat16")
    assert dtype.remedy == ""


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[FakeHub]:
    """A Hub of this machine, and an empty cache."""
    with serve(FakeHub(repos={DEFAULT_MODEL: {"config.json": b"{}"}})) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):  # older versions hold a copy
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        yield served


def test_weights_that_may_be_fetched_need_no_remedy(hub):
    (found,) = doctor.weights()
    assert found.value == f"{DEFAULT_MODEL} is not in the cache; the first run fetches it"
    assert found.remedy == ""
    of_files = [request.split()[0] for request in hub.requests if "/resolve/" in request]
    assert of_files == ["HEAD"]  # nothing is fetched


def test_weights_that_are_gated_name_the_page_and_the_login(hub):
    hub.gated[DEFAULT_MODEL] = "hf_right"
    (found,) = doctor.weights()
    assert "the Hub refuses it (" in found.value
    assert f"{hub.url}/{DEFAULT_MODEL}" in found.remedy
    assert "log" in found.remedy or "token" in found.remedy


def test_a_hub_that_is_not_there_is_told_apart_from_one_that_refuses(hub, monkeypatch):
    template = "http://127.0.0.1:1/{repo_id}/{revision}/{filename}"
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    (found,) = doctor.weights()
    assert "cannot be reached" in found.value
    assert "xmag-mini" in found.remedy


def test_little_shared_memory_comes_with_its_remedy(monkeypatch):
    usage = SimpleNamespace(free=64 << 20)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    for found in doctor.shared_memory():  # none where there is no /dev/shm
        assert found.value == "0.1 GiB free"
        assert "--shm-size" in found.remedy


def test_a_package_that_is_missing_is_a_fault_with_the_command_that_installs_it(
    monkeypatch, capsys
):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "" if name == "h5py" else real(name))
    for check in ("extras", "cpu", "memory", "shared_memory", "cuda", "weights", "speed"):
        monkeypatch.setattr(doctor, check, lambda: ())
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "missing: h5py" in out
    assert "-> pip install h5py" in out


@pytest.mark.parametrize(
    ("flags", "dtype", "told"),
    [
        ("amx_bf16 avx512_bf16", "auto", "AMX-BF16 and AVX512-BF16: .* is about three times as"),
        ("avx512_bf16", "auto", "AVX512-BF16: .* may be faster; .* do not mix"),
        ("avx2 avx512f", "auto", None),
        ("amx_bf16", "bfloat16", None),
    ],
)
def test_the_log_advises_bfloat16_once_where_the_cpu_has_units_for_it(
    flags, dtype, told, monkeypatch, caplog
):
    monkeypatch.setattr("xmag.devices.cpu_info", lambda: CPUINFO.format(flags=flags))
    devices.advise_dtype.cache_clear()
    caplog.set_level("INFO", logger="xmag")
    encoder = xmag.load_model("xmag-mini", device="cpu", dtype=dtype)
    assert caplog.text == ""  # until it computes
    for _ in range(2):
        encoder.embed(np.zeros((1, 224, 224, 3), np.uint8))
    lines = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    devices.advise_dtype.cache_clear()
    assert len(lines) == (told is not None)
    if told is not None:
        assert 'dtype="bfloat16" (--dtype bfloat16)' in lines[0]
        assert re.search(told, lines[0])
        assert str(encoder.dtype) == "torch.float32"  # auto stays
