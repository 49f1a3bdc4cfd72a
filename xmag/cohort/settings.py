"""Settings of a cohort, the same for every slide."""

from dataclasses import dataclass
from typing import Any, Literal

from xmag.cores import usable_cores
from xmag.encoder import TileEncoder
from xmag.errors import InputError
from xmag.extract import Transform, fingerprint_of
from xmag.grid import Border
from xmag.plan import check_grid, plan_options
from xmag.tiles import PROCESSES_SUPPORTED, Damaged, Limits, check_damaged
from xmag.tissue import TISSUE_METHOD
from xmag.urls import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of a cohort, the same for every slide."""

    encoder: TileEncoder
    out: Place
    tissue: Literal["auto"] | None
    overlap: int
    min_tissue: float | None
    border: Border
    overlay: bool
    batch_size: int | None
    processes: int | None
    slide_timeout: float | None
    memory_limit: int | None
    damaged: Damaged
    on_mismatch: Literal["error", "redo"]
    transform: Transform | None

    def __post_init__(self) -> None:
        if self.tissue not in ("auto", None):
            raise InputError(
                f"tissue is {self.tissue!r}; a cohort takes 'auto' or None (every tile); for a mask"
                " of your own use extract_features() on each slide"
            )
        check_damaged(self.damaged)
        check_grid(
            self.encoder.tile_spec,
            overlap=self.overlap,
            min_tissue=self.min_tissue,
            border=self.border,
        )
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size!r}; expected at least 1, or None")
        if self.on_mismatch not in ("error", "redo"):
            raise InputError(f"on_mismatch is {self.on_mismatch!r}; expected 'error' or 'redo'")
        if self.processes is not None and not (
            isinstance(self.processes, int) and self.processes >= 0
        ):
            raise InputError(f"processes is {self.processes!r}; expected 0 or more, or None")
        if self.processes and not PROCESSES_SUPPORTED:
            raise InputError(
                f"processes is {self.processes}, but this system has no decoding processes; use 0"
            )
        if self.limits != Limits() and (self.processes == 0 or not PROCESSES_SUPPORTED):
            raise InputError(
                "slide_timeout and memory_limit hold for decoding processes, and there are none"
                " here; expected processes to be at least 1, or no limits"
            )

    @property
    def limits(self) -> Limits:
        """Limits of time and memory for one slide."""
        return Limits(slide_timeout=self.slide_timeout, memory_limit=self.memory_limit)

    def processes_for(self, slides: int) -> int:
        """Number of decoding processes for so many slides: those asked for, or those that pay.

        One a core where a GPU embeds faster than threads of one process decode. Elsewhere one: it
        keeps up, and a slide that crashes it does not take this process down.
        """
        if self.processes is not None:
            return min(self.processes, slides)
        if not PROCESSES_SUPPORTED:
            return 0
        on_cuda = getattr(getattr(self.encoder, "device", None), "type", "cpu") == "cuda"
        return min(usable_cores(), slides) if on_cuda else min(1, slides)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The fingerprint that a bag made with these settings has."""
        method = None if self.tissue is None else TISSUE_METHOD
        options = plan_options(
            overlap=self.overlap,
            min_tissue=self.min_tissue,
            border=self.border,
            tissue_method=method,
        )
        return fingerprint_of(self.encoder, options, self.transform)
