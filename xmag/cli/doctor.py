"""The command doctor: what this machine has for xmag, and the remedy for what it lacks."""

import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from xmag.cli.console import ALL_DONE, FAILED, one_line, write
from xmag.cores import bfloat16_units, cpu_info, gain_of_bfloat16, system_text, usable_cores
from xmag.errors import HubError, XmagError

# What is heavy is imported by the checks: the first line is there at once.


class Finding(NamedTuple):
    """A line of the report, with the remedy where something lacks or could be faster.

    `is_fault` is what keeps xmag from working.
    """

    label: str
    value: str
    remedy: str = ""
    is_fault: bool = False


def doctor() -> int:
    """Print what was found, each with its remedy; FAILED where xmag cannot work here."""
    status = ALL_DONE
    for check in (versions, extras, cpu, memory, shared_memory, cuda, weights, speed):
        for found in check():
            write(sys.stdout, f"{found.label:<10}{found.value}")
            if found.remedy:
                write(sys.stdout, f"{'':<10}-> {found.remedy}")
            sys.stdout.flush()
            if found.is_fault:
                status = FAILED
        if check is cuda and status == FAILED:  # what follows needs torch
            break
    return status


def versions() -> Iterator[Finding]:
    """Versions of xmag, Python, and the packages that xmag needs."""
    system = f"{platform.system()} {platform.machine()}"
    yield Finding(
        "xmag", f"{metadata.version('xmag')}, Python {platform.python_version()}, {system}"
    )
    needed, _ = _requirements()
    found = {name: _version(name) for name in needed}
    yield Finding("packages", ", ".join(f"{n} {v}" for n, v in found.items() if v))
    if missing := [name for name, version in found.items() if not version]:
        remedy = f"pip install {' '.join(missing)}"
        yield Finding("", f"missing: {', '.join(missing)}", remedy, is_fault=True)


def extras() -> Iterator[Finding]:
    """Extras, readers of other formats among them, whose packages are all there, or not."""
    _, by_extra = _requirements()
    there = [extra for extra, names in by_extra.items() if all(map(_version, names))]
    lacking = [extra for extra in by_extra if extra not in there]
    remedy = f'for those that you need: pip install "xmag[{",".join(lacking)}]"' if lacking else ""
    told = f"; not installed: {', '.join(lacking)}" if lacking else ""
    yield Finding("extras", f"{', '.join(there) or 'none'}{told}", remedy)


def _requirements() -> tuple[list[str], dict[str, list[str]]]:
    """The packages that xmag needs, and those of each extra."""
    needed: list[str] = []
    by_extra: dict[str, list[str]] = {}
    for line in metadata.requires("xmag") or ():
        package, _, marker = line.partition(";")
        found = re.match(r"[\w.-]+", package)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        if found:
            (by_extra.setdefault(extra[1], []) if extra else needed).append(found[0])
    return needed, by_extra


def _version(package: str) -> str:
    """The version of an installed package; empty for one that is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def cpu(info: str | None = None) -> Iterator[Finding]:
    """The CPU, its units for bfloat16, and the dtype that pays; `info` is /proc/cpuinfo."""
    if info is None:
        info = cpu_info()
    name = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    units = bfloat16_units(info)
    yield Finding(
        "CPU",
        f"{name[1] if name else platform.processor() or platform.machine()},"
        f" {usable_cores()} cores to use; {', '.join(units) or 'no units for bfloat16'}",
    )
    faster = f"--dtype bfloat16 {gain_of_bfloat16(units)}, see the speeds"
    remedy = f"{faster}; its features do not mix with those of float32" if units else ""
    yield Finding(
        "dtype", "auto takes float32 on a CPU, so that features of all of them mix", remedy
    )


def memory() -> Iterator[Finding]:
    """Memory that is free, and the limit of this container where there is one."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", system_text("/proc/meminfo"), re.MULTILINE)
    limit = system_text("/sys/fs/cgroup/memory.max").strip()
    sizes = [int(found[1]) << 10] if found else []
    told = [f"{_gib(sizes[0])} available"] if sizes else []
    if limit.isdecimal():
        sizes.append(int(limit))
        told.append(f"this container may use {_gib(int(limit))}")
    few = bool(sizes) and min(sizes) < _LEAST_MEMORY
    remedy = "give --processes 1 and --batch-size 8, or more memory" if few else ""
    yield Finding("memory", ", ".join(told) or "unknown on this system", remedy)


_LEAST_MEMORY = 4 << 30
_LEAST_SHARED = 512 << 20


def shared_memory() -> Iterator[Finding]:
    """Room in /dev/shm, where tiles pass from decoding processes to the model."""
    if not Path("/dev/shm").is_dir():
        return
    free = shutil.disk_usage("/dev/shm").free
    remedy = "" if free >= _LEAST_SHARED else "docker run --shm-size 2g, or --processes 0"
    yield Finding("/dev/shm", f"{_gib(free)} free", remedy)


def cuda() -> Iterator[Finding]:
    """Torch, and the GPUs that it sees, with the dtype that the model has there."""
    try:
        import torch

        from xmag.devices import resolve_device, resolve_dtype
    except (ImportError, OSError) as error:
        remedy = "install torch again: see https://pytorch.org/get-started"
        yield Finding("torch", f"cannot be imported: {error}", remedy, is_fault=True)
        return
    threads = torch.get_num_threads()
    slow = threads < usable_cores() and "OMP_NUM_THREADS" in os.environ
    remedy = "unset OMP_NUM_THREADS, if this machine is yours alone" if slow else ""
    yield Finding("torch", f"{torch.__version__}, {threads} threads", remedy)
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(number)
        dtype = str(resolve_dtype("auto", torch.device("cuda", number))).removeprefix("torch.")
        told = f"{number}: {about.name}, {_gib(about.total_memory)}, auto takes {dtype}"
        yield Finding("" if number else "CUDA", told)
    if not torch.cuda.is_available():
        remedy = ""
        if shutil.which("nvidia-smi"):
            build = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "has none"
            remedy = f"there is a driver, but torch {build}: https://pytorch.org/get-started"
        yield Finding("CUDA", f"none; models run on {resolve_device('auto').type}", remedy)


def weights() -> Iterator[Finding]:
    """Whether the official weights are in the cache, or can be fetched."""
    from huggingface_hub import constants, get_token

    from xmag.hub.fetch import locate_model
    from xmag.hub.registry import DEFAULT_MODEL, MINI

    try:
        found = locate_model(DEFAULT_MODEL, local_files_only=True)
    except HubError:
        pass
    except XmagError as error:  # a folder here is called as the model, and holds none
        remedy = f"call {DEFAULT_MODEL} otherwise in this folder, or begin in another"
        yield Finding("weights", one_line(str(error)), remedy, is_fault=True)
        return
    else:
        yield Finding("weights", f"{DEFAULT_MODEL} @ {str(found.revision)[:7]}, in the cache")
        return
    there = f"copy a cache that has them here (HF_HOME), or give --model FOLDER, or --model {MINI}"
    absent = f"{DEFAULT_MODEL} is not in the cache"
    if constants.HF_HUB_OFFLINE:
        remedy = f"unset HF_HUB_OFFLINE for the first run; or {there}"
        yield Finding("weights", f"{absent}, and HF_HUB_OFFLINE is set", remedy)
        return
    told, refused = _asked(DEFAULT_MODEL)
    remedy = f"connect once; or {there}"
    if refused:
        login = "with the token that is set" if get_token() else "after `hf auth login`"
        page = f"{constants.ENDPOINT}/{DEFAULT_MODEL}"
        remedy = f"accept the terms at {page}, and try again {login}; or {there}"
    yield Finding("weights", f"{absent}{told}", remedy if told != _FETCHABLE else "")


_FETCHABLE = "; the first run fetches it"


def _asked(name: str) -> tuple[str, bool]:
    """Answer of the Hub on whether a model may be fetched, and whether it refused."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    from xmag.hub.fetch import hub_failures, status_of

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=_HUB_TIMEOUT_S)
    except EntryNotFoundError:
        pass  # it answered: the repository is there, without this file
    except hub_failures() as error:
        if (status := status_of(error)) in (401, 403, 404):
            return f", and the Hub refuses it ({status}): it is gated, or not public", True
        return f", and the Hub cannot be reached ({type(error).__name__})", False
    return _FETCHABLE, False


_HUB_TIMEOUT_S = 5.0


def speed() -> Iterator[Finding]:
    """Speed of one tile at a time with the model in the package, on the device of "auto"."""
    try:
        import numpy as np

        from xmag.devices import resolve_device
        from xmag.encoder import load_model
        from xmag.hub.registry import MINI

        device = resolve_device("auto").type
        dtypes = ("float32", "bfloat16") if device == "cpu" else ("auto",)
        told = []
        for dtype in dtypes:
            encoder = load_model(MINI, dtype=dtype)
            size = encoder.tile_spec.size_px
            embed = partial(encoder.embed, np.zeros((1, size, size, 3), np.uint8))
            told.append(f"{1 / _best(embed):.0f} tiles/s in {dtype}")
    except (XmagError, ImportError, RuntimeError) as error:
        remedy = "run `xmag demo -v` to see more"
        yield Finding("speed", f"failed: {one_line(error)}", remedy, is_fault=True)
        return
    yield Finding("speed", f"{', '.join(told)}: one at a time, {MINI} on {device}")


def _best(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of five runs; the first also warms up."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        work().cpu()  # waits until it is there
        times.append(time.perf_counter() - began)
    return max(min(times), 1e-9)


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
