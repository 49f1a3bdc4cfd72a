"""What is the same for every slide of a cohort."""

from dataclasses import dataclass
from typing import Any, Literal

from xmag.encoder import TileEncoder
from xmag.errors import InputError
from xmag.extract import Transform, fingerprint_of
from xmag.plan import check_grid, plan_options
from xmag.tiles import PROCESSES_SUPPORTED, usable_cores
from xmag.tissue import TISSUE_METHOD
from xmag.urls import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is the same for every slide of a cohort."""

    encoder: TileEncoder
    out: Place
    tissue: Literal["auto"] | None
    overlap: int
    min_tissue: float
    overlay: bool
    batch_size: int | None
    processes: int | None
    on_mismatch: Literal["error", "redo"]
    transform: Transform | None

    def __post_init__(self) -> None:
        if self.tissue not in ("auto", None):
            raise InputError(
                f"tissue is {self.tissue!r}; a cohort takes 'auto' or None (every tile); for a mask"
                " of your own use extract_features() on each slide"
            )
        check_grid(self.encoder.tile_spec, overlap=self.overlap, min_tissue=self.min_tissue)
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

    def processes_for(self, slides: int) -> int:
        """How many decoding processes so many slides get: those asked for, or those that pay.

        One a core where a GPU embeds faster than threads of one process decode; none elsewhere.
        """
        if self.processes is not None:
            return min(self.processes, slides)
        on_cuda = getattr(getattr(self.encoder, "device", None), "type", "cpu") == "cuda"
        if not (on_cuda and PROCESSES_SUPPORTED) or slides == 1:
            return 0
        return min(usable_cores(), slides)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The fingerprint that a bag made with these settings has."""
        method = None if self.tissue is None else TISSUE_METHOD
        options = plan_options(
            overlap=self.overlap, min_tissue=self.min_tissue, tissue_method=method
        )
        return fingerprint_of(self.encoder, options, self.transform)
