"""Progress of long calls: bars on terminals and in notebooks, and events for programs.

`progress=` of a function is True, False, None (where a person sees it: on a terminal and in a
notebook), or a function, which is called with each `ProgressEvent` instead. What that raises ends
the call.
"""

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Self

from tqdm import tqdm
from tqdm.notebook import tqdm as tqdm_widget


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressEvent:
    """Progress of a call, at one moment.

    Attributes:
        what: The work, such as "decoding", "slides", the name of a slide, or a step that has no
            count, such as "loading xmag-mini".
        unit: What `done` and `total` count, such as "tile" and "slide".
        done: How many are done.
        total: How many there are; None where nobody knows.
        seconds: Since this work began.
        tiles: Of a cohort, the tiles that are embedded; else None.
        tiles_total: Of a cohort, how many there will be, by the slides seen so far.
        per_second: Of a cohort tiles a second, else units; None before the first.
        seconds_left: By that rate; None where it is not known.
    """

    what: str
    unit: str = ""
    done: int = 0
    total: int | None = None
    seconds: float = 0.0
    tiles: int | None = None
    tiles_total: int | None = None
    per_second: float | None = None
    seconds_left: float | None = None


ProgressOption = bool | Callable[[ProgressEvent], object] | None
"""Types that `progress=` takes."""


def is_shown(progress: ProgressOption) -> bool:
    """Whether a person is shown the progress."""
    if callable(progress):
        return False
    return sys.stderr.isatty() or _is_notebook() if progress is None else progress


def tell(progress: ProgressOption, what: str) -> None:
    """Say what is done now, where it has nothing to count: a line on stderr, or an event."""
    if callable(progress):
        progress(ProgressEvent(what=what))
    elif is_shown(progress):
        sys.stderr.write(f"xmag: {what}\n")
        sys.stderr.flush()


def progress_bar(progress: ProgressOption, **options: Any) -> Any:
    """A bar with the `update` and `set_postfix` of tqdm, shown as `progress` says.

    It is a widget in a notebook that has ipywidgets, text on stderr everywhere else, and for a
    function the calls of it. `options` are tqdm's: total, desc, unit, initial.
    """
    if callable(progress):
        return _Events(progress, **options)
    shown = is_shown(progress)
    if shown and _is_notebook() and find_spec("ipywidgets") is not None:
        return _Widget(**options)
    return _Bar(disable=not shown, file=sys.stderr, **options)


def _is_notebook() -> bool:
    # IPython is never imported for this: a kernel that runs this code has imported it already.
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"


class _Events:
    """Calls of a program's function, in place of a bar."""

    def __init__(
        self,
        call: Callable[[ProgressEvent], object],
        *,
        total: int | None = None,
        desc: str = "",
        unit: str = "",
        initial: int = 0,
    ) -> None:
        self._call, self._what, self._unit = call, desc, unit
        self._total, self._initial, self._done = total, initial, initial
        self._start = time.monotonic()

    def __enter__(self) -> Self:
        self.update(0)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def set_postfix(self, *_: object, **__: object) -> None:
        """Metrics beside a bar, which are no progress."""

    def update(self, number: int = 1) -> None:
        """Count some more, and tell."""
        self._done += number
        seconds, new = time.monotonic() - self._start, self._done - self._initial
        left = None if self._total is None else self._total - self._done
        rate = new / seconds if new and seconds > 0 else None
        self._call(
            ProgressEvent(
                what=self._what, unit=self._unit, done=self._done, total=self._total,
                seconds=seconds, per_second=rate,
                seconds_left=None if rate is None or left is None else left / rate,
            )
        )  # fmt: skip


class CohortProgress:
    """Progress of a cohort: slides, and the tiles by which a bar moves within them.

    How many tiles there will be is known of the slides whose tiles are planned, and of the others
    taken to be as many as these have on average.
    """

    def __init__(self, progress: ProgressOption, slides: int) -> None:
        self._call = progress if callable(progress) else None
        self._bar = progress_bar(
            False if callable(progress) else progress,
            total=1.0, miniters=0, desc=f"0/{slides} slides", bar_format=_COHORT_FORMAT,
        )  # fmt: skip
        self._slides, self._counts = slides, Counter[str]()
        self._planned = self._plans = self._tiles = self._unplanned = 0
        self._start = time.monotonic()

    def __enter__(self) -> Self:
        self._show()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def count(self, planned: int | None, embedded: int = 0) -> None:
        """Count the tiles of a slide that is planned now, or some that are embedded."""
        if planned is not None:
            self._planned, self._plans = self._planned + planned, self._plans + 1
        self._tiles += embedded
        self._show()

    def row(self, status: str, tiles: int, *, is_elsewhere: bool) -> None:
        """Count a slide that is done with; one of a worker `is_elsewhere`, with all its tiles."""
        self._counts[status] += 1
        if is_elsewhere and status in ("done", "empty"):
            self.count(tiles, tiles)
            return
        # What was there already, or could not be opened, has no plan.
        self._unplanned += status == "skipped" or is_elsewhere
        self._show()

    def _show(self) -> None:
        rows, seconds = self._counts.total(), time.monotonic() - self._start
        expected = None
        if self._plans:
            unseen = max(0, self._slides - self._plans - self._unplanned)
            expected = max(self._tiles, round(self._planned * (1 + unseen / self._plans)))
        if rows == self._slides:
            expected = self._tiles
        rate = self._tiles / seconds if self._tiles and seconds > 0 else None
        left = (expected - self._tiles) / rate if expected and rate else None
        if self._call is not None:
            self._call(
                ProgressEvent(
                    what="slides", unit="slide", done=rows, total=self._slides, seconds=seconds,
                    tiles=self._tiles, tiles_total=expected, per_second=rate, seconds_left=left,
                )
            )  # fmt: skip
            return
        told = [f"{rows:,}/{self._slides:,} slides", f"{self._tiles:,} tiles"]
        if rate:
            told.append(f"{rate:,.1f} tiles/s")
        if left:
            told.append(f"{tqdm.format_interval(left)} left")
        counts = [f"{count:,} {status}" for status, count in self._counts.items()]
        self._bar.n = max(rows / max(1, self._slides), self._tiles / expected if expected else 0)
        self._bar.set_description_str("; ".join([", ".join(told), *counts]), refresh=False)
        self._bar.update(0)


_COHORT_FORMAT = "{percentage:3.0f}%|{bar}| {desc}"


class _Bar(tqdm):  # type: ignore[type-arg]  # tqdm is generic for checkers alone
    """A tqdm text bar without a monitoring thread, and with a lock of threads alone.

    Making tqdm's own fixes the start method of multiprocessing for the whole program.
    """

    monitor_interval = 0


class _Widget(tqdm_widget):  # type: ignore[type-arg]
    """A tqdm notebook widget without the side effects that `_Bar` avoids."""

    monitor_interval = 0


_BAR_LOCK = threading.RLock()
_Bar.set_lock(_BAR_LOCK)
_Widget.set_lock(_BAR_LOCK)
