"""The overlay of each slide: its thumbnail with tissue and tiles, beside its bag."""

from dataclasses import dataclass

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from xmag import files
from xmag.cohort.jobs import Job
from xmag.cohort.settings import Settings
from xmag.draw.frame import Pictured
from xmag.draw.overview import OVERLAY_PX, overlay
from xmag.plan import TilePlan
from xmag.slide import SlideFacts
from xmag.tiles import Thumbnail
from xmag.tissue import TissueMask
from xmag.urls import Place

THUMBNAIL_PX = OVERLAY_PX


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Facts and thumbnail of a slide, to draw it where only a decoding process may open it."""

    name: str
    mpp: float | None
    dimensions: tuple[int, int]
    image: Image.Image

    @classmethod
    def of(cls, slide: SlideFacts, thumbnail: Thumbnail) -> "Kept":
        """The slide with these facts and this thumbnail."""
        image = Image.fromarray(thumbnail.pixels)
        return cls(name=slide.name, mpp=slide.mpp, dimensions=thumbnail.dimensions, image=image)

    def thumbnail(self, *, max_px: int) -> Image.Image:
        """The thumbnail, which was made with `THUMBNAIL_PX`."""
        assert max_px == THUMBNAIL_PX
        return self.image


def picture_of(job: Job, settings: Settings) -> Place:
    """Path of the overlay of a slide, beside its bag."""
    output = settings.out / job.output
    return output.with_name(output.name + ".png")


def is_picture_missing(job: Job, settings: Settings) -> bool:
    """Whether pictures are asked for and this one is not there."""
    return settings.overlay and not picture_of(job, settings).exists()


def write_picture(
    slide: Pictured, job: Job, settings: Settings, tissue: TissueMask | None, plan: TilePlan
) -> None:
    """Write the picture of a slide's tissue and tiles."""
    refuse_foreign_picture(job, settings)
    own = PngInfo()
    own.add_text("Software", "xmag")
    with files.atomic_path(picture_of(job, settings), inside=settings.out) as path:
        image = overlay(slide, tissue=tissue, plan=plan, max_px=THUMBNAIL_PX)
        image.save(path, format="PNG", pnginfo=own)


def refuse_foreign_picture(job: Job, settings: Settings) -> None:
    """Raise OutputError where the picture of a slide would replace one that xmag did not write."""
    files.require_own(picture_of(job, settings), settings.out, _is_picture)


def _is_picture(head: bytes) -> bool:
    """Whether a file begins as `write_picture` has it: a PNG that names its software."""
    return head.startswith(b"\x89PNG") and b"tEXtSoftware\0xmag" in head
