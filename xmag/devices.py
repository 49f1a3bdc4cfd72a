"""Device and dtype to compute with, and contexts that set torch's state and restore it."""

import functools
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from xmag.cores import bfloat16_units, cpu_info, gain_of_bfloat16
from xmag.errors import InputError

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str | torch.device) -> torch.device:
    """The torch.device for a `device=` argument; InputError where this machine has none."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise InputError(
            f'device={device!r} is unknown; expected "auto", "cpu", "cuda", "cuda:1" or "mps"'
        ) from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"device={device!r} was asked for, but torch {torch.__version__} sees no CUDA device;"
            ' use device="auto", or install a torch with CUDA and a driver for it'
        )
    return resolved


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The torch.dtype for a `dtype=` argument on a device; InputError for an unsupported one."""
    if dtype == "auto":
        if device.type != "cuda":
            return torch.float32
        # From compute capability 8.0 on; torch's own test also counts what is only emulated.
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float16
    resolved = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in _DTYPES.values():
        raise InputError(f'dtype={dtype!r} is unknown; expected "auto" or one of {sorted(_DTYPES)}')
    return resolved


@functools.cache
def advise_dtype(kind: str, dtype: torch.dtype) -> None:
    """Log, once a process, that a model in float32 on this CPU would gain by bfloat16.

    `kind` is the type of its device. "auto" stays float32 there, so that the bags of different
    machines mix.
    """
    if kind == "cpu" and dtype == torch.float32 and (units := bfloat16_units(cpu_info())):
        logger.info(
            'this CPU has %s: dtype="bfloat16" (--dtype bfloat16) %s; features made so do not mix'
            " with those of float32",
            " and ".join(units),
            gain_of_bfloat16(units),
        )


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """A context without autocast, even where the caller has switched it on."""
    if device.type in ("cpu", "cuda"):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


_MAKERS = {
    torch.empty, torch.eye, torch.full, torch.linspace, torch.ones, torch.rand, torch.randn,
    torch.tensor, torch.zeros,
}  # fmt: skip


class Float32(TorchFunctionMode):
    """A context in which new float tensors are float32 by default, in this thread alone.

    Whatever torch.set_default_dtype says, which is the whole program's: random numbers that are
    drawn in another dtype are other numbers.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a torch function; factories of floats get dtype=float32 unless one is given."""
        kwargs = kwargs or {}
        if func not in _MAKERS or kwargs.get("dtype") is not None:
            return func(*args, **kwargs)
        if func in (torch.full, torch.tensor):
            made = func(*args, **{**kwargs, "device": "meta"})
            if made.dtype != torch.get_default_dtype():  # of ints or bools
                return func(*args, **kwargs)
        return func(*args, **{**kwargs, "dtype": torch.float32})


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """A context with torch's default generators of the CPU and of `device` seeded, then restored.

    What torch draws inside, for initial weights and dropout, depends on `seed` alone as long as no
    other thread draws too. torch.manual_seed would seed every other device as well.
    """
    on_gpu = device.type == "cuda"
    mps_state = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        with torch.random.fork_rng(devices=[device] if on_gpu else []):
            torch.default_generator.manual_seed(seed)
            if on_gpu:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            elif mps_state is not None:
                torch.mps.manual_seed(seed)
            yield
    finally:
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)


@contextmanager
def own_torch(device: torch.device) -> Iterator[None]:
    """A context to train in: gradients on, cuDNN deterministic, whatever the caller has set."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    with torch.inference_mode(False), torch.enable_grad():
        try:
            if device.type == "cuda":
                cudnn.deterministic, cudnn.benchmark = True, False
            yield
        finally:
            if device.type == "cuda":
                cudnn.deterministic, cudnn.benchmark = before
