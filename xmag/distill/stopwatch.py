"""Profiling of a step by named parts, with CUDA events and no synchronisation."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Timer of named parts of the work on one device; `seconds` sums them up.

    On CUDA a part is what the device did between its events, on the CPU what the host did. A part
    named by `host` is always timed on the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A context whose device time counts towards `name`."""
        if self._device.type != "cuda":
            with self.host(name):
                yield
            return
        start, end = _event(), _event()
        start.record()
        yield
        end.record()
        self._events.append((name, start, end))

    @contextmanager
    def host(self, name: str) -> Iterator[None]:
        """A context whose host time counts towards `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._host[name] += time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """The seconds of each part so far; synchronises the device, and resets."""
        if self._events:
            torch.cuda.synchronize(self._device)
        for name, start, end in self._events:
            self._host[name] += start.elapsed_time(end) / 1e3
        result = dict(self._host)
        self._host.clear()
        self._events.clear()
        return result


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
