"""Cohorts in programs of their own, which are killed at any instant or at a named step.

As a program (``python killing.py JSON``) it runs one cohort and prints its rows. Nothing here is
known to the product: a step is met by replacing, in that program alone, the function that does it.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from support.encoders import ColourEncoder
from support.slides import texture, write_svs

from xmag import files
from xmag.bag import FeatureBag, bag
from xmag.cohort import extract_cohort
from xmag.errors import BagError

TOLERANCE = 1e-4
STEPS = ("before write", "mid-write", "before sync", "before rename", "after rename")
_DIES_S = 120.0
"""At most, however busy the machine is."""


class SlowEncoder(ColourEncoder):
    """Colours, at a pace that leaves time to be killed."""

    def __init__(self, seconds, name="colours"):
        super().__init__(name=name)
        self.seconds = seconds

    def embed(self, tiles):
        time.sleep(self.seconds)
        return super().embed(tiles)


def write_slides(folder: Path, count: int, *, mpp: float = 0.25) -> None:
    """Small slides of 1 to 4 tiles, each with other pixels."""
    folder.mkdir(parents=True)
    base = texture(1000, 1000)
    for number in range(count):
        width, height = 500 + 450 * (number % 2), 500 + 450 * (number // 2 % 2)
        pixels = np.roll(base, (37 * number, 91 * number), (0, 1))[:height, :width]
        path = folder / f"{number:03}.svs"
        write_svs(path, pixels=np.ascontiguousarray(pixels), levels=(1, 4), mpp=mpp)


def descendants(pid: int) -> list[int]:
    """The processes below one."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    found, front = [], {pid}
    while front:
        front = {child for child, parent in parents.items() if parent in front}
        found += sorted(front)
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def survivors(pids: list[int], seconds: float = _DIES_S) -> list[int]:
    """Those that are still there after a while."""
    until = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    return [pid for pid in pids if is_alive(pid)]


class Trial:
    """One folder of slides, one of outputs, and what an undisturbed run makes of them."""

    def __init__(self, slides: Path, work: Path, **options: object) -> None:
        self.slides, self.work, self.options = slides, work, {"processes": 1, **options}
        self.out = work / "undisturbed"
        self.names = sorted(path.stem for path in slides.glob("*.svs"))
        self.run_to_end()
        self.reference = {name: FeatureBag.load(self.path(name)) for name in self.names}
        self.out = work / "out"

    def path(self, name: str) -> Path:
        return self.out / f"{name}.h5"

    def start(self, **options: object) -> subprocess.Popen[str]:
        """A program that does the cohort, or goes on with it."""
        call = {"slides": str(self.slides), "out": str(self.out), **self.options, **options}
        return subprocess.Popen(
            [sys.executable, __file__, json.dumps(call)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def run_to_end(self, **options: object) -> list[dict[str, object]]:
        """The rows of a run that is not disturbed."""
        return rows_of(self.start(**options))

    def outputs(self) -> dict[str, tuple[int, int]]:
        """Inode and time of the files under final names."""
        found = {}
        for path in self.out.glob("*.h5"):
            stat = path.stat()
            found[path.stem] = (stat.st_ino, stat.st_mtime_ns)
        return found

    def lost(self) -> list[str]:
        """Those there of which the file is broken, or not as an undisturbed run makes it."""
        return [name for name in self.outputs() if not self._is_right(name)]

    def missing(self) -> list[str]:
        there = self.outputs()
        return [name for name in self.names if name not in there]

    def _is_right(self, name: str) -> bool:
        try:
            found = FeatureBag.load(self.path(name))
        except BagError:
            return False
        reference = self.reference[name]
        records = [
            {k: v for k, v in each.provenance.record.items() if k != "created"}
            for each in (found, reference)
        ]
        return (
            np.array_equal(found.coords, reference.coords)
            and np.allclose(found.features, reference.features, rtol=0, atol=TOLERANCE)
            and found.provenance.fingerprint == reference.provenance.fingerprint
            and records[0] == records[1]
            and found.tiles == reference.tiles
        )

    def kill_at_random(self, rng: random.Random, *, within_s: float) -> dict[str, object]:
        """Kill a run at some instant once it has written a file; what that did."""
        before = self.outputs()
        with self.start() as process:
            needed = max(2, len(before) + 1)
            while process.poll() is None and len(self.outputs()) < needed:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, within_s))
            whole_tree = rng.random() < 0.5
            below = descendants(process.pid)
            process.kill()
            for pid in below if whole_tree else ():
                _kill(pid)
            output = process.communicate()
        return self._after("random instant", before, process, below, output)

    def kill_at_step(self, step: str, *, nth: int) -> dict[str, object]:
        """Let a run kill itself at the nth time that it comes to a step."""
        before = self.outputs()
        with self.start(die_at=step, nth=nth) as process:
            below: list[int] = []
            while process.poll() is None:
                below = descendants(process.pid) or below
                time.sleep(0.002)
            output = process.communicate()
        return self._after(step, before, process, below, output)

    def _after(
        self,
        how: str,
        before: dict[str, tuple[int, int]],
        process: "subprocess.Popen[str]",
        below: list[int],
        output: tuple[str, str],
    ) -> dict[str, object]:
        after = self.outputs()
        assert process.returncode in (0, -signal.SIGKILL), output
        return {
            "how": how,
            "was killed": process.returncode == -signal.SIGKILL,
            "there": len(after),
            "missing": len(self.names) - len(after),
            "touched": [name for name in before if after.get(name) != before[name]],
            "lost": self.lost(),
            "children left": survivors(below),
        }


def rows_of(process: "subprocess.Popen[str]") -> list[dict[str, object]]:
    """The rows that a program prints which ends well."""
    with process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    rows: list[dict[str, object]] = json.loads(out)
    return rows


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _die_at(step: str, nth: int) -> None:
    """Replace what does a step by what is killed there, the nth time that it is for a bag."""
    times = iter(range(1, 10**9))

    def die_if_due() -> None:
        if next(times) == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(function: Callable[..., object], *, after: bool = False) -> Callable[..., object]:
        def instead(path: Path, *more: object) -> object:
            is_bag = str(more[0] if more else path).endswith(".h5")
            if is_bag and not after:
                die_if_due()
            result = function(path, *more)
            if is_bag and after:
                die_if_due()
            return result

        return instead

    if step == "before rename":
        Path.replace = dying(Path.replace)  # type: ignore[method-assign,assignment]
    elif step == "after rename":
        Path.replace = dying(Path.replace, after=True)  # type: ignore[method-assign,assignment]
    else:
        _die_in_writing(step, die_if_due)


def _die_in_writing(step: str, die_if_due: Callable[[], None]) -> None:
    whole = bag.write_bytes

    def write_bytes(
        path: Path, data: bytes, *, validate: Callable[[Path], object] | None, inside: Path | None
    ) -> None:
        if not str(path).endswith(".h5"):
            whole(path, data, validate=validate, inside=inside)
            return
        with (
            files.atomic_path(path, validate=validate, inside=inside) as temp,
            temp.open("wb") as file,
        ):
            if step == "before write":
                die_if_due()
            file.write(data[: len(data) // 2])
            file.flush()
            if step == "mid-write":
                die_if_due()
            file.write(data[len(data) // 2 :])
            file.flush()
            if step == "before sync":
                die_if_due()

    bag.write_bytes = write_bytes


def main(
    *,
    slides: str,
    out: str,
    pace_s: float = 0.0,
    encoder_name: str = "colours",
    die_at: str | None = None,
    nth: int = 1,
    **options: object,
) -> Iterator[dict[str, object]]:
    """The rows of a cohort."""
    if die_at is not None:
        _die_at(die_at, nth)
    encoder = SlowEncoder(pace_s, encoder_name)
    for row in extract_cohort(slides, out, model=encoder, tissue=None, progress=False, **options):
        yield {"slide": row.slide, "status": row.status, "error": row.error}


if __name__ == "__main__":
    # What starts tests in the background may have them ignore Ctrl-C, which is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        print(json.dumps(list(main(**json.loads(sys.argv[1])))))
    except KeyboardInterrupt:
        print(json.dumps({"stopped at": time.monotonic()}))  # one clock for all processes
        raise
