"""Every promise of docs/security.md that is about what xmag does not do."""

import contextlib
import csv
import io
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz import checkpoints
from huggingface_hub import constants, file_download
from PIL import Image
from safetensors.torch import save, save_file
from support.encoders import ColourEncoder
from support.hub_server import FakeHub, serve
from support.models import TINY, random_state
from support.patient import EVERYWHERE, PLANTED, SECRET, has_mark
from support.slides import write_svs

from xmag import draw
from xmag.bag import FeatureBag
from xmag.cli import main
from xmag.cohort import extract_cohort
from xmag.demo import write_demo_slide
from xmag.encoder import load_model
from xmag.errors import HubError, ModelError, XmagError, XmagWarning
from xmag.extract import extract_features
from xmag.geometry import TileSpec
from xmag.hub.registry import SCHEMA, ModelConfig
from xmag.mil import MILClassifier
from xmag.plan import plan_tiles
from xmag.slide import Slide
from xmag.slide.directories import tifffile_unheard
from xmag.tiles import read_tiles
from xmag.tissue import find_tissue

SPEC = TileSpec(mpp=1.0, size_px=32)
TOKEN = "hf_Secrettoken0123456789"

# Imported by every Python that is started, before all else: each write and each way out of the
# process goes into a file, and a way out of the machine ends the process.
WATCH = """
import os, sys
log = os.open(os.environ["WATCH_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
def watch(event, args):
    if event == "open":
        path, mode, flags = args
        writing = (mode is not None and set(mode) & set("wax+")) or (flags or 0) & WRITES
        if writing and not isinstance(path, int):
            os.write(log, f"open {os.path.abspath(os.fsdecode(path))}\\n".encode())
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink",
                   "os.truncate", "os.chmod", "os.utime", "shutil.move", "shutil.copyfile"):
        if isinstance(args[0], int):
            return  # a file that was opened, which has been told
        os.write(log, f"{event} {os.path.abspath(os.fsdecode(args[0]))}\\n".encode())
        if event in ("os.rename", "os.link", "shutil.move", "shutil.copyfile"):
            os.write(log, f"{event} {os.path.abspath(os.fsdecode(args[1]))}\\n".encode())
    elif event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.bind",
                   "socket.gethostbyname", "urllib.Request"):
        os.write(log, f"NETWORK {event} {args!r}\\n".encode())
        raise AssertionError(f"{event} {args}")
    elif event in ("os.system", "os.exec", "pty.spawn"):
        os.write(log, f"COMMAND {event} {args!r}\\n".encode())
    elif event == "subprocess.Popen":
        os.write(log, f"child {args[0]}\\n".encode())
sys.addaudithook(watch)
"""

JOB = """
import os, sys
import xmag
slide, out = sys.argv[1:]
encoder = xmag.load_model("xmag-mini", device="cpu")
bag = xmag.extract_features(slide, model=encoder, progress=False)
bag.save(f"{out}/bag.h5")
bag.save(f"{out}/bag.safetensors")
bag.export(f"{out}/bag.pt", layout="clam")
bag.export(f"{out}/stamp.h5", layout="stamp")
assert len(xmag.FeatureBag.load(f"{out}/bag.h5")) == len(bag) > 0
for processes in (0, 2):
    report = xmag.extract_cohort(
        [slide], f"{out}/{processes}", model=encoder, overlay=True, processes=processes,
        progress=False,
    )
    assert [row.status for row in report] == ["done"]
os.mkdir(f"{out}/model")
encoder.save(f"{out}/model")
again = xmag.extract_features(slide, model=f"{out}/model", progress=False)
assert len(again) == len(bag)
classifier = xmag.MILClassifier(aggregator="mean", epochs=1, progress=False, random_state=0)
bags = [bag.features + shift for shift in range(8)]
classifier.fit(bags, [0, 1] * 4, groups=range(8), validation=None)
classifier.save(f"{out}/classifier")
assert xmag.MILClassifier.load(f"{out}/classifier").predict(bags).shape == (8,)
"""


class Command:
    """A pickle of it would touch a file."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._marker}",)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A file that is there at the end of the test if any code of a pickle ran."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "code in a file was run"


def pickles(marker: Path) -> dict[str, bytes]:
    """Files with a command in them, in every container that torch and pickle have."""
    contents: dict[str, Any] = {
        "bare": Command(marker),
        "state dict": {"state_dict": {"model.norm.weight": torch.zeros(3), "x": Command(marker)}},
    }
    found = {}
    for name, content in contents.items():
        for zipped in (True, False):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
            found[f"{name}, {'zip' if zipped else 'legacy'}"] = buffer.getvalue()
        for protocol in (0, 2, 4):
            found[f"{name}, protocol {protocol}"] = pickle.dumps(content, protocol)
    return found


def test_the_planted_pickles_do_run_where_pickle_is_trusted(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    for data in pickles(marker).values():
        with warnings.catch_warnings(), contextlib.suppress(RuntimeError):  # no checkpoint, but run
            warnings.simplefilter("ignore")
            torch.load(io.BytesIO(data), weights_only=False)
        assert marker.exists()
        marker.unlink()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".safetensors"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_pickle_in_weights_is_executed(tmp_path: Path, marker: Path, suffix: str) -> None:
    for name, data in pickles(marker).items():
        path = tmp_path / f"weights{suffix}"
        path.write_bytes(data)
        with pytest.raises(ModelError):
            load_model(path, config=TINY, device="cpu")
        assert not marker.exists(), name


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_no_refusal_of_a_pickle_advises_to_trust_it(tmp_path: Path, marker: Path) -> None:
    program = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), program)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name in ("storages", "tensors", "pickle"):
            tar.addfile(tarfile.TarInfo(name))
    path = tmp_path / "weights.pth"
    for name, data in {
        **pickles(marker),
        "TorchScript": program.getvalue(),
        "tar": archive.getvalue(),
    }.items():
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'torch.load' received a zip file")
            with pytest.raises(ModelError) as refused:
                load_model(path, config=TINY, device="cpu")
        said = str(refused.value)
        assert not re.search("weights_only|trust|likely succeed|allowlist|safe_globals", said), name
        if "zip" in name or "legacy" in name:
            assert f"it names {os.system.__module__}.system" in said, name


@pytest.mark.parametrize("suffix", [".h5", ".safetensors", ".pt"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_pickle_in_a_bag_is_executed(tmp_path: Path, marker: Path, suffix: str) -> None:
    for data in pickles(marker).values():
        path = tmp_path / f"bag{suffix}"
        path.write_bytes(data)
        with pytest.raises(XmagError):
            MILClassifier(epochs=1, random_state=0).fit([path, path], [0, 1], groups=[0, 1])
        if suffix != ".pt":
            with pytest.raises(XmagError):
                FeatureBag.load(path)


def test_no_pickle_in_a_classifier_is_executed(tmp_path: Path, marker: Path) -> None:
    files = checkpoints.seeds()
    folder = tmp_path / "classifier"
    folder.mkdir()
    for name in ("classifier.json", "classifier.safetensors"):
        for data in pickles(marker).values():
            for each in ("classifier.json", "classifier.safetensors"):
                (folder / each).write_bytes(files[each])
            (folder / name).write_bytes(data)
            (folder / "classifier.pkl").write_bytes(data)
            with pytest.raises(ModelError):
                MILClassifier.load(folder)


def test_code_beside_weights_is_never_run(tmp_path: Path, marker: Path) -> None:
    code = f"open({str(marker)!r}, 'w').close()\n"
    for name in ("modeling_xmag.py", "__init__.py", "setup.py", "conftest.py"):
        (tmp_path / name).write_text(code)
    config = {
        "format": SCHEMA,
        "name": "a/tiny",
        "auto_map": {"AutoModel": "modeling_xmag.Model"},
        "trust_remote_code": True,
        **ModelConfig(vit=TINY).to_dict(),
    }
    save_file(random_state(TINY), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(tmp_path, device="cpu").provenance["name"] == str(tmp_path)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A whole job, offline: its folder, and what it and its children wrote, in lines."""
    root = tmp_path_factory.mktemp("watched")
    for name in ("hook", "home", "tmp", "out", "cwd"):
        (root / name).mkdir()
    (root / "hook" / "sitecustomize.py").write_text(WATCH)
    slide = write_demo_slide(root / "slide.svs", size=(5800, 4700))
    environment = {
        # PyTorch notes where its compiler is to write, which children of this process inherit.
        **{k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_", "TORCH"))},
        "PYTHONPATH": os.pathsep.join([str(root / "hook"), str(Path(__file__).parents[1])]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "WATCH_LOG": str(root / "log"),
        "HOME": str(root / "home"),
        "TMPDIR": str(root / "tmp"),
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", JOB, str(slide), str(root / "out")],
        capture_output=True, text=True, timeout=800, cwd=root / "cwd", env=environment, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (result.stdout, result.stderr) == ("", "")
    return root, (root / "log").read_text().splitlines()


def test_the_watch_sees_what_is_written(watched: tuple[Path, list[str]]) -> None:
    root, log = watched
    written = {line.partition(" ")[2] for line in log}
    assert any(line.startswith(f"os.rename {root / 'out'}") for line in log)
    assert str(root / "out" / "bag.h5") in written
    assert str(root / "out" / "2" / "slide.h5.png") in written
    assert sum(line.startswith("child ") for line in log) >= 2


def test_nothing_is_written_outside_the_output_folder(watched: tuple[Path, list[str]]) -> None:
    root, log = watched
    # Memory shared with decoding processes, in a file without a name, and Python's own look
    # whether the temporary folder can be written to.
    shared = (str(root / "tmp") + os.sep, "/dev/shm/xmag-")
    allowed = (str(root / "out") + os.sep, "/dev/null", *shared)
    for line in log:
        kind, _, path = line.partition(" ")
        if kind in ("child", "NETWORK"):
            continue
        # A decoding process asks to be the first to go where memory runs out.
        assert path.startswith(allowed) or path in ("/dev/shm", "/proc/self/oom_score_adj"), line
    for name in ("home", "cwd"):
        assert list((root / name).iterdir()) == [], name
    # PyTorch makes a folder for its compiler when something is trained, and leaves it empty.
    left = list((root / "tmp").rglob("*"))
    assert all(path.is_dir() and path.name.startswith("torchinductor_") for path in left), left
    assert not list(Path("/dev/shm").glob("xmag-*"))


def test_offline_nothing_is_asked_of_the_network_and_no_command_is_run(
    watched: tuple[Path, list[str]],
) -> None:
    _, log = watched
    assert not [line for line in log if line.startswith(("NETWORK", "COMMAND"))]
    children = {line.partition(" ")[2] for line in log if line.startswith("child ")}
    # PyTorch asks for the name of the system.
    assert children <= {sys.executable, "uname"}, children


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of slides in every format with SECRET in their metadata, and in their path."""
    folder = tmp_path_factory.mktemp(f"of-{SECRET}") / "slides"
    folder.mkdir()
    for name, write in PLANTED.items():
        write(folder / name)
    return folder


class Log(logging.Handler):
    """All that is logged, as text."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(logging.Formatter("%(name)s %(message)s"))
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += self.format(record) + "\n"


@pytest.fixture
def log() -> Iterator[Log]:
    """What the loggers of xmag and of tifffile say, at DEBUG."""
    handler = Log()
    loggers = [logging.getLogger(name) for name in (None, "xmag", "tifffile", "PIL", "h5py")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    yield handler
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


def assert_clean(folder: Path) -> int:
    """Raise where SECRET is in the name or the bytes of any file; how many were looked at."""
    count = 0
    secrets = [SECRET.encode(code) for code in ("utf-8", "utf-16-le", "utf-16-be")]
    for path in folder.rglob("*"):
        assert SECRET not in path.relative_to(folder).as_posix()
        if path.is_file():
            count += 1
            data = path.read_bytes()
            assert not any(secret in data for secret in secrets), path
            if path.suffix == ".png":
                with Image.open(path) as image:
                    # A cohort's own name their software, so that they are known again.
                    assert image.info == ({"Software": "xmag"} if ".h5" in path.name else {}), path
                    assert not has_mark(image), path
    return count


def shown(*things: object) -> list[str]:
    """All that Python, a notebook and a debugger show of things."""
    found = []
    for thing in things:
        found += [repr(thing), str(thing)]
        ways = [way for way in dir(type(thing)) if way.startswith("_repr_")]
        found += [str(getattr(thing, way)()) for way in ways]
    return found


@pytest.mark.filterwarnings("ignore::xmag.errors.XmagWarning")
@pytest.mark.parametrize("name", PLANTED)
def test_what_a_scanner_wrote_of_the_patient_appears_nowhere(
    planted: Path, tmp_path: Path, log: Log, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    encoder, path = ColourEncoder(spec=SPEC), planted / name
    region = 0 if name == "leica.scn" else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", XmagWarning)
        with Slide(path, mpp=0.25, region=region) as slide:
            tissue = find_tissue(slide)
            plan = plan_tiles(slide, SPEC)
            for _, tiles in read_tiles(slide, plan):
                assert not has_mark(Image.fromarray(np.concatenate(tiles)))
            bag = extract_features(slide, model=encoder, plan=plan)
            pictures = {
                "thumbnail": slide.thumbnail(max_px=64),
                "overlay": draw.overlay(slide, tissue=tissue, plan=plan),
            }
            said = shown(slide, slide.facts, tissue, plan, bag, bag.provenance)
            said += shown(slide.properties, slide.associated_images)
    assert len(bag) > 0
    for kind, picture in pictures.items():
        picture.save(tmp_path / f"{kind}.png")
    for target in ("a.h5", "a.safetensors"):
        bag.save(tmp_path / target)
    bag.export(tmp_path / "a.pt", layout="clam")
    bag.export(tmp_path / "stamp.h5", layout="stamp")
    (tmp_path / "tissue.geojson").write_text(json.dumps(tissue.to_geojson()))
    report = extract_cohort(
        [path], tmp_path / "out", model=encoder, tissue=None, mpp=0.25, overlay=True
    )
    assert report[0].status == ("failed" if region == 0 else "done"), report[0].error
    assert main(["info", str(path), *(["--region", "0"] if region == 0 else [])]) == 0
    assert assert_clean(tmp_path) >= (8 if region == 0 else 10)
    said += [log.text, *(str(w.message) for w in caught), *shown(report), *capfd.readouterr()]
    assert not any(SECRET in text for text in said), said


@pytest.mark.parametrize("name", EVERYWHERE)
def test_nor_in_what_the_command_line_writes_and_says(
    planted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    path, mpp = str(planted / name), ["--mpp", "0.25"]
    args = ["--model", "xmag-mini", "-o", str(tmp_path / "out"), "--overlay", "-v"]
    assert main(["info", path, "-v"]) == 0
    assert main(["extract", path, *args, *mpp]) == 0
    assert_clean(tmp_path)
    assert SECRET not in "".join(capfd.readouterr())
    assert main(["info", path, "--properties"]) == 0  # it is there
    assert SECRET in capfd.readouterr().out


@pytest.mark.parametrize("name", EVERYWHERE)
def test_nor_in_anndata(planted: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("anndata")
    with Slide(planted / name, mpp=0.25) as slide:
        bag = extract_features(slide, model=ColourEncoder(spec=SPEC), tissue=None)
        table = bag.to_anndata(slide)
    table.write_h5ad(tmp_path / "a.h5ad")
    assert assert_clean(tmp_path) == 1
    assert SECRET not in "".join(shown(table, table.uns))
    (picture,) = (space["images"]["hires"] for space in table.uns["spatial"].values())
    assert not has_mark(Image.fromarray(np.asarray(picture)))


@pytest.mark.parametrize("name", PLANTED)
def test_it_is_in_properties_and_labels_of_these_slides(planted: Path, name: str) -> None:
    with Slide(planted / name, mpp=0.25, region=0) as slide:
        texts = dict(slide.properties)
        images = {**slide.associated_images}
    assert any(SECRET in text for text in texts.values())
    if name in EVERYWHERE:
        assert images.keys() & {"label", "macro"}
        assert all(has_mark(image) for kind, image in images.items() if kind != "thumbnail")


def test_only_the_thread_that_opens_a_slide_hears_nothing_of_tifffile(log: Log) -> None:
    logger = logging.getLogger("tifffile")
    before = list(logger.filters)

    def from_another_thread(text: str) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(logger.warning, text).result()

    with tifffile_unheard():
        with tifffile_unheard():
            logger.warning("not this")
        logger.warning("nor this")
        from_another_thread("but this")
    logger.warning("and this")
    assert [line for line in log.text.splitlines() if "this" in line] == 2 * [
        "tifffile but this"
    ] + (2 * ["tifffile and this"])
    assert logger.filters == before


def _told(error: BaseException) -> str:
    """An error with those before it, as a program that fails shows them."""
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize("name", EVERYWHERE)
def test_errors_about_whole_slides_do_not_repeat_what_the_scanner_wrote(
    planted: Path, log: Log, name: str
) -> None:
    slide = Slide(planted / name, mpp=0.25)
    fine = TileSpec(mpp=0.01, size_px=32)
    failing: list[Callable[[], object]] = [
        lambda: Slide(planted / name, region=7),
        lambda: slide.read_region((-1, 0), (9, 9)),
        lambda: slide.properties["nothing"],
        lambda: slide.associated_images["nothing"],
        lambda: plan_tiles(slide, fine),
        lambda: extract_features(slide, model=ColourEncoder(spec=SPEC), region=0),
        slide.close,
        lambda: slide.properties,
        lambda: slide.associated_images,
    ]
    told = []
    for fails in failing:
        try:
            fails()
        except (XmagError, KeyError) as error:
            told.append(_told(error))
    assert len(told) == len(failing) - 1
    assert not any(SECRET in text.replace(str(planted), "") for text in told), told
    assert SECRET not in log.text


def _damage(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a file, or each of a folder."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        file.write_bytes(change(file.read_bytes()))


_SHORT = "Qz"
"""What stands in place of numbers, as often as there is room for it."""


def _in_place_of(pattern: bytes, data: bytes) -> bytes:
    """Write _SHORT over what matches, whose length stays."""
    return re.sub(pattern, lambda found: (_SHORT.encode() * len(found[0]))[: len(found[0])], data)


_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "cut directory": lambda data: data[:-40],
    # Where a text is not what the vendor writes, what was read of it may end up in the error.
    "numbers": partial(_in_place_of, rb'(?<==")\d\d+'),
    "fractions": partial(_in_place_of, rb'(?<=")0\.0\d+'),
    "fields": partial(_in_place_of, rb"(?<=MPP = )[\d.]+|(?<=AppMag = )\d+"),
    "xml": lambda data: data.replace(b"</", b"<<"),
}


def _errors(path: Path, mpp: float | None) -> Iterator[str]:
    """Errors of the features, the properties and the associated images of a slide."""
    try:
        extract_features(path, model=ColourEncoder(spec=SPEC), mpp=mpp)
    except XmagError as error:
        yield _told(error)
    try:
        with Slide(path, mpp=0.25, region=0) as slide:
            for read in (lambda: [*slide.properties], lambda: [*slide.associated_images.values()]):
                try:
                    read()
                except XmagError as error:
                    yield _told(error)
    except XmagError as error:
        yield _told(error)


@pytest.mark.parametrize("name", [n for n in PLANTED if not n.endswith((".png", ".jpg"))])
def test_errors_and_logs_about_damaged_slides_do_not_repeat_what_the_scanner_wrote(
    planted: Path, tmp_path: Path, log: Log, name: str
) -> None:
    for way, change in _DAMAGE.items():
        path = tmp_path / f"{way}{Path(name).suffix}"
        copy = shutil.copytree if (planted / name).is_dir() else shutil.copy
        copy(planted / name, path)
        _damage(path, change)
        for mpp in (None, 0.25):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for told in _errors(path, mpp):
                    assert SECRET not in told, way
                    assert _SHORT not in told, way
                assert not any(re.search(f"{SECRET}|{_SHORT}", str(w.message)) for w in caught)
    assert SECRET not in log.text
    assert _SHORT not in log.text


def test_a_report_names_no_folder_above_the_slides(tmp_path: Path, log: Log) -> None:
    folder = tmp_path / SECRET / "slides"
    folder.mkdir(parents=True)
    write_svs(folder / "fine.svs", size=(600, 500))
    (folder / "empty.svs").touch()
    (folder / "folder.svs").mkdir()
    paths = [folder / f"{name}.svs" for name in ("fine", "empty", "folder", "missing")]
    for processes in (0, 2):
        out = tmp_path / f"out {processes}"
        report = extract_cohort(paths, out, model=ColourEncoder(), tissue=None, processes=processes)
        assert [row.status for row in report] == ["done", "failed", "failed", "failed"]
        with (out / "report.csv").open() as file:
            assert [row["slide"] for row in csv.DictReader(file)] == [p.name for p in paths]
        assert_clean(out)
    assert SECRET not in log.text


def test_a_token_stands_in_no_error_log_or_provenance(
    tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"format": SCHEMA, "name": "a/tiny", **ModelConfig(vit=TINY).to_dict()}
    files = {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": save(random_state(TINY)),
    }
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    said = []
    with serve(FakeHub(repos={"a/tiny": files}, gated={"a/tiny": TOKEN})) as hub:
        # What HF_ENDPOINT does, which huggingface_hub reads once, at its import.
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        for module in (constants, file_download):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        for name, token in (("a/tiny", f"{TOKEN}wrong"), ("a/none", TOKEN)):
            with pytest.raises(HubError) as refused:
                load_model(name, token=token, cache_dir=tmp_path / "other", device="cpu")
            said.append(str(refused.value))
        encoder = load_model("a/tiny", token=TOKEN, cache_dir=tmp_path / "cache", device="cpu")
    (tmp_path / "model").mkdir()
    encoder.save(tmp_path / "model")
    said += [json.dumps(dict(encoder.provenance), default=str), repr(encoder), log.text]
    assert not any(TOKEN in text for text in said), said
    for path in tmp_path.rglob("*"):
        assert not (path.is_file() and TOKEN.encode() in path.read_bytes()), path
