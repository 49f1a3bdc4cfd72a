"""Pictures of a cohort: the overlay of each slide, beside its bag."""

from dataclasses import dataclass

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from xmag import files
from xmag.cohort.jobs import Job, Settings
from xmag.draw.overview import OVERLAY_PX, overlay
from xmag.plan import TilePlan
from xmag.tiles.decoder import Thumbnail
from xmag.urls import Place


@dataclass(frozen=True, slots=True)
class KeptSlide:
    """Facts and thumbnail of a slide, to draw it where only a decoding process may open it."""

    name: str
    mpp: float | None
    seen: Thumbnail

    @property
    def dimensions(self) -> tuple[int, int]:
        """(width, height) in level-0 px."""
        return self.seen.dimensions

    def thumbnail(self, *, max_px: int) -> Image.Image:
        """The thumbnail, which was made for `max_px`."""
        assert max(self.seen.pixels.shape) <= max_px
        return Image.fromarray(self.seen.pixels)


def picture_of(job: Job, settings: Settings) -> Place:
    """Path of the overlay of a slide, beside its bag."""
    output = settings.out / job.output
    return output.with_name(output.name + ".png")


def write_picture(job: Job, settings: Settings, slide: KeptSlide, plan: TilePlan | None) -> None:
    """Write the overlay of a slide."""
    own = PngInfo()
    own.add_text("Software", "xmag")
    with files.atomic_path(picture_of(job, settings), inside=settings.out) as path:
        image = overlay(slide, tissue=slide.seen.tissue, plan=plan, max_px=OVERLAY_PX)
        image.save(path, format="PNG", pnginfo=own)


def require_own_picture(job: Job, settings: Settings) -> None:
    """Raise OutputError where the picture of a slide would replace one that xmag did not write."""
    files.require_own(picture_of(job, settings), settings.out, _is_own_picture)


def _is_own_picture(head: bytes) -> bool:
    return head.startswith(b"\x89PNG") and b"tEXtSoftware\0xmag" in head
