"""What the benchmarks share: fair repetition, the machine, a table, JSON."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "xmag", "torch", "numpy", "simplejpeg", "imagecodecs", "tifffile", "pillow",
    "openslide-python", "tiffslide", "timm", "transformers",
)  # fmt: skip


def interleaved(
    contenders: Mapping[str, Callable[[], Any]], *, repeats: int
) -> dict[str, list[float]]:
    """Seconds of each contender, `repeats` times, in turn, after one untimed turn each.

    A machine whose speed drifts slows all of them alike; ratios within a turn stay fair.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the ratios, turn by turn."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def machine() -> dict[str, Any]:
    """What the figures were measured with."""
    found = {"python": platform.python_version(), "cpu": _cpu_name(), "cores": usable_cores()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if "torch" in found:
        import torch

        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
            found["cuda"] = torch.version.cuda
    return found


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table; floats with three digits."""
    header = list(rows[0])
    cells = [[_text(row.get(name, "")) for name in header] for row in rows]
    widths = [max(len(x) for x in column) for column in zip(header, *cells, strict=True)]

    def line(values: Sequence[str]) -> str:
        return "| " + " | ".join(v.ljust(w) for v, w in zip(values, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in cells)])


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def report(name: str, rows: Sequence[Mapping[str, Any]], path: Path | None, **more: Any) -> None:
    """Print the table and the machine, and write both as JSON if a path is given."""
    print(f"\n{name}\n\n{table(rows)}\n")
    facts = machine()
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    if path is not None:
        result = {"benchmark": name, "machine": facts, "rows": list(rows), **more}
        path.write_text(json.dumps(result, indent=1) + "\n")
