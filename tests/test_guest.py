"""Every sentence of docs/guest.md: what xmag leaves alone in the program that uses it.

Those about names and settings of the Hub are in test_hub.py, pickling a Slide is in slide/.
"""

import asyncio
import json
import multiprocessing
import re
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
import safetensors.torch
from support.hub_server import FakeHub, serve
from support.models import TINY, random_state
from support.programs import run_program
from support.slides import texture
from support.zarr_slides import write_zarr

import xmag
from xmag.demo import write_demo_slide
from xmag.hub.registry import SCHEMA, ModelConfig

# Refuses every way out of the process that Python code has.
NO_NETWORK = """
import sys
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.bind"):
        raise AssertionError(f"{event} {args}")
sys.addaudithook(refuse)
"""

# What a program may have set up for itself, each thing off its default.
STATE = """
import json, multiprocessing, os, random, signal, sys, threading, warnings
import numpy as np, torch
from PIL import Image, ImageFile

def settle():
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    torch.set_num_threads(3)
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    Image.MAX_IMAGE_PIXELS = 123_456_789
    warnings.filterwarnings("ignore", message="known to the host")
    warnings.filterwarnings("always", message="of the host")
    signal.signal(signal.SIGUSR1, lambda *_: None)
    os.environ["OF_THE_HOST"] = "1"

def state():
    return {
        "random": repr(random.getstate()),
        "numpy random": repr(np.random.get_state()),
        "torch random": torch.get_rng_state().tolist(),
        "torch threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch dtype": str(torch.get_default_dtype()),
        "torch device": str(torch.get_default_device()),
        "torch grad": torch.is_grad_enabled(),
        "torch deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "sdp": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
        "cuda": torch.cuda.is_initialized(),
        "pillow": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES),
        "numpy errors": repr(np.geterr()),
        "numpy print": repr(np.get_printoptions()),
        "warning filters": repr(warnings.filters),
        "signals": {s.name: repr(signal.getsignal(s)) for s in signal.valid_signals()
                    if isinstance(s, signal.Signals)},
        "start method": multiprocessing.get_start_method(allow_none=True),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "hooks": (repr(sys.excepthook), repr(threading.excepthook), repr(sys.unraisablehook)),
        "recursion limit": sys.getrecursionlimit(),
        "threads": sorted(t.name for t in threading.enumerate()),
        "children": repr(multiprocessing.active_children()),
    }
"""


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_slide(tmp_path_factory.mktemp("guest") / "slide.svs", size=(5800, 4700))


@pytest.fixture(scope="module")
def encoder() -> xmag.Encoder:
    return xmag.load_model("xmag-mini", device="cpu")


def _in_8_threads(job: Callable[[int], np.ndarray]) -> list[np.ndarray]:
    start = threading.Barrier(8)

    def together(number: int) -> np.ndarray:
        start.wait()
        return job(number)

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(together, range(8)))


def test_import_makes_no_request_touches_no_cuda_warns_and_prints_nothing() -> None:
    program = """
    import xmag
    loaded = {name.partition(".")[0] for name in sys.modules}
    heavy = {"torch", "numpy", "PIL", "tifffile", "huggingface_hub", "h5py", "tqdm"}
    assert not loaded & heavy, loaded & heavy
    """
    assert run_program(NO_NETWORK + textwrap.dedent(program)) == ""


def test_import_is_quick_for_it_loads_nothing_but_the_standard_library() -> None:
    program = """
    import sys
    before = set(sys.modules)
    import xmag
    loaded = set(sys.modules) - before
    print(*sorted(m for m in loaded if m.partition(".")[0] not in sys.stdlib_module_names))
    print(*sorted(loaded & {"asyncio", "concurrent.futures", "multiprocessing", "subprocess"}))
    """
    assert run_program(program).splitlines() == ["xmag", ""]


def test_reading_slides_never_imports_torch(slide_path: Path) -> None:
    program = """
    import sys
    import xmag
    with xmag.Slide(sys.argv[1]) as slide:
        tissue = xmag.find_tissue(slide)
        plan = xmag.plan_tiles(slide, xmag.TileSpec(), tissue=tissue)
        tiles = sum(len(batch) for _, batch in xmag.tiles.read_tiles(slide, plan))
        assert xmag.slide.Slide is type(slide)
        assert tiles == len(plan) > 0
        slide.thumbnail(max_px=64)
    assert "torch" not in sys.modules
    """
    assert run_program(program, slide_path) == ""


def test_no_module_below_the_encoder_imports_torch() -> None:
    program = """
    import importlib, pkgutil, sys
    import xmag.bag, xmag.plan, xmag.slide, xmag.tiles, xmag.tissue
    for package in (xmag.bag, xmag.slide, xmag.tiles):
        for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            importlib.import_module(module.name)
    assert "xmag.tiles.worker" in sys.modules
    assert "torch" not in sys.modules
    """
    assert run_program(program) == ""


@pytest.mark.parametrize("settle", ["", "settle()"], ids=["by default", "set up by the host"])
def test_a_full_extraction_leaves_the_process_as_it_was(
    slide_path: Path, tmp_path: Path, settle: str
) -> None:
    program = f"""
    {settle}
    before = state()
    import xmag
    encoder = xmag.load_model("xmag-mini", device="cpu")
    bag = xmag.extract_features(sys.argv[1], model=encoder, progress=False)
    bag.save("bag.h5")
    bag.save("bag.safetensors")
    bag.export("bag.pt", layout="clam")
    assert (xmag.FeatureBag.load("bag.h5").features == bag.features).all() and len(bag)
    for processes in (0, 1):
        report = xmag.extract_cohort(
            [sys.argv[1]], f"out {{processes}}", model=encoder, overlay=True, progress=False,
            processes=processes,
        )
        assert [row.status for row in report] == ["done"]
    after = state()
    print(json.dumps([key for key in before if before[key] != after[key]]))
    multiprocessing.set_start_method("spawn")
    """
    changed = run_program(NO_NETWORK + STATE + textwrap.dedent(program), slide_path, cwd=tmp_path)
    assert json.loads(changed) == []


@pytest.fixture(scope="module")
def zarr_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guest")
    return write_zarr(folder / "slide.zarr", texture(1000, 700), zarr_format=3, shard=256)


def test_reading_an_ome_zarr_leaves_no_thread_no_event_loop_and_no_filter_of_zarr(
    zarr_path: Path,
) -> None:
    program = """
    import asyncio, pickle, warnings
    from concurrent.futures import ThreadPoolExecutor
    settle()
    before = state()
    import xmag

    def tiles(slide, threads=4):
        plan = xmag.plan_tiles(slide, xmag.TileSpec(mpp=1.0, size_px=112))
        return [t.tobytes() for _, t in xmag.read_tiles(slide, plan, threads=threads)]

    async def in_a_loop():
        with xmag.Slide(sys.argv[1]) as slide:
            return tiles(slide), await asyncio.to_thread(tiles, slide)

    with xmag.Slide(sys.argv[1]) as slide:
        expected = tiles(slide)
        with ThreadPoolExecutor(8) as pool:
            assert set(map(tuple, pool.map(tiles, [slide] * 8))) == {tuple(expected)}
        assert asyncio.run(in_a_loop(), debug=True) == (expected, expected)
        with pickle.loads(pickle.dumps(slide)) as again:
            assert tiles(again) == expected
        child = os.fork()
        if not child:
            os._exit(0 if tiles(slide) == expected else 1)
        assert os.waitpid(child, 0)[1] == 0
        context = multiprocessing.get_context("fork")
        with context.Pool(1) as pool:  # of daemonic workers
            assert pool.apply(tiles, (slide,)) == expected
    assert "zarr" not in sys.modules  # it sets warning filters where it is imported
    after = state()
    print(json.dumps([key for key in before if before[key] != after[key]]))
    """
    changed = run_program(NO_NETWORK + STATE + textwrap.dedent(program), zarr_path)
    assert json.loads(changed) == []


def test_fetching_a_model_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    config = {"format": SCHEMA, "name": "a/tiny", **ModelConfig(vit=TINY).to_dict()}
    files = {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": safetensors.torch.save(random_state(TINY)),
    }
    program = """
    from huggingface_hub import HfApi  # what it does on import is not ours to answer for
    before = state()
    import xmag
    assert xmag.load_model("a/tiny").provenance["name"] == "a/tiny"
    after = state()
    print(json.dumps([key for key in before if before[key] != after[key]]))
    """
    with serve(FakeHub(repos={"a/tiny": files})) as hub:
        changed = run_program(
            STATE + textwrap.dedent(program), HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path)
        )
    assert set(json.loads(changed)) <= {"threads"}  # huggingface_hub's bar keeps a daemon thread


def test_a_progress_bar_leaves_the_start_method_to_the_host(slide_path: Path) -> None:
    program = """
    import contextlib, io, multiprocessing, sys
    import xmag
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        xmag.extract_features(sys.argv[1], model="xmag-mini", progress=True)
    assert "100%" in shown.getvalue()
    multiprocessing.set_start_method("spawn")
    """
    assert run_program(program, slide_path) == ""


def test_the_logger_is_silent_until_the_program_listens() -> None:
    program = """
    import logging
    import xmag
    assert [type(h) for h in logging.getLogger("xmag").handlers] == [logging.NullHandler]
    assert logging.getLogger("xmag").level == logging.NOTSET
    assert not logging.getLogger().handlers
    logging.getLogger("xmag.slide").error("to nobody")
    """
    assert run_program(program) == ""


def test_progress_goes_to_stderr_and_only_where_a_person_sees_it(
    slide_path: Path,
    encoder: xmag.Encoder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    xmag.extract_features(slide_path, model=encoder)
    assert capsys.readouterr() == ("", "")
    xmag.extract_features(slide_path, model=encoder, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert slide_path.name in err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    xmag.extract_features(slide_path, model=encoder)
    out, err = capsys.readouterr()
    assert out == ""
    assert slide_path.name in err
    xmag.extract_features(slide_path, model=encoder, progress=False)
    assert capsys.readouterr() == ("", "")


def test_one_encoder_serves_8_threads(encoder: xmag.Encoder) -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (8, 2, 224, 224, 3), np.uint8)
    alone = [encoder.embed(batch).numpy() for batch in tiles]
    together = _in_8_threads(lambda i: encoder.embed(tiles[i]).numpy())
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_one_slide_serves_8_threads(slide_path: Path) -> None:
    with xmag.Slide(slide_path) as slide:

        def column(number: int) -> np.ndarray:
            places = [(500 * number, 200 * row) for row in range(20)]
            return np.stack([slide.read_region(place, (64, 64), mpp=1.0) for place in places])

        alone = [column(number) for number in range(8)]
        together = _in_8_threads(column)
    np.testing.assert_array_equal(alone, together)


def test_one_encoder_and_one_slide_make_the_same_bag_in_8_threads(
    slide_path: Path, encoder: xmag.Encoder
) -> None:
    with xmag.Slide(slide_path) as slide:
        alone = xmag.extract_features(slide, model=encoder)
        together = _in_8_threads(lambda _: np.asarray(xmag.extract_features(slide, model=encoder)))
    for features in together:
        np.testing.assert_allclose(features, alone.features, atol=1e-5)


def test_a_cohort_runs_in_a_thread_that_is_not_the_main_one(
    slide_path: Path, tmp_path: Path, encoder: xmag.Encoder
) -> None:
    with ThreadPoolExecutor(1) as pool:
        report = pool.submit(
            xmag.extract_cohort, [slide_path], tmp_path, model=encoder, processes=1
        ).result(timeout=800)
    assert [row.status for row in report] == ["done"]


def test_it_works_in_a_running_asyncio_loop(slide_path: Path, encoder: xmag.Encoder) -> None:
    async def serve() -> tuple[int, int]:
        here = xmag.extract_features(slide_path, model=encoder)
        there = await asyncio.to_thread(xmag.extract_features, slide_path, model=encoder)
        return len(here), len(there)

    here, there = asyncio.run(serve(), debug=True)
    assert here == there > 0


def _extract_and_send(path: Path, out: Path, send: object) -> None:
    encoder = xmag.load_model("xmag-mini", device="cpu")
    bag = xmag.extract_features(path, model=encoder)
    statuses = [
        row.status
        for processes in (0, 1)
        for row in xmag.extract_cohort(
            [path], out / f"{processes}", model=encoder, processes=processes
        )
    ]
    send.send((len(bag), statuses))


def test_it_works_in_a_daemonic_process(slide_path: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    worker = context.Process(
        target=_extract_and_send, args=(slide_path, tmp_path, send), daemon=True
    )
    worker.start()
    assert receive.poll(100)
    tiles, statuses = receive.recv()
    worker.join(800)
    receive.close()
    send.close()
    assert tiles > 0
    assert statuses == ["done", "done"]
    assert worker.exitcode == 0


def test_it_works_in_jupyter(slide_path: Path) -> None:
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [
        nbformat.v4.new_code_cell(
            "import xmag\n"
            f"bag = xmag.extract_features({str(slide_path)!r}, model='xmag-mini')\n"
            "print(len(bag), 'tiles', flush=True)"
        )
    ]
    nbclient.NotebookClient(notebook, timeout=800, kernel_name="python3").execute()
    streams = {"stdout": "", "stderr": ""}
    for output in notebook.cells[0].outputs:
        assert output.output_type == "stream", output
        streams[output.name] += output.text
    assert re.fullmatch(r"[1-9]\d* tiles\n", streams["stdout"])
    assert slide_path.name in streams["stderr"]  # the bar
    assert "IProgress" not in streams["stderr"]
