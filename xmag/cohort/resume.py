"""Bags of an earlier run that are still valid, and need not be made again."""

import json
import logging
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from xmag import files
from xmag.bag import FeatureBag, NewerBagError
from xmag.bag.formats import ForeignBagError, UnreadableBagError
from xmag.cohort.jobs import Job, Settings
from xmag.draw.frame import Pictured
from xmag.draw.overview import OVERLAY_PX, overlay
from xmag.errors import BagError, MismatchError, OutputError, XmagError
from xmag.plan import TilePlan
from xmag.provenance import Provenance
from xmag.slide import SlideFacts
from xmag.tiles import Earlier, Thumbnail
from xmag.tissue import TissueMask
from xmag.urls import Place, Url, retold

logger = logging.getLogger(__name__)

SEEN_NAME = ".xmag-seen.jsonl"
_OPEN = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
"""Flags for opening: another user of the folder may have put a link or a FIFO there."""


@dataclass(frozen=True, slots=True)
class Found:
    """A valid bag of an earlier run: its number of tiles, its record, and its coverage."""

    tiles: int
    record: Mapping[str, Any]
    coverage: float | None = None

    @property
    def of_slide(self) -> tuple[Mapping[str, Any] | None, float | None]:
        """The content of the slide it was made from, and its µm/px."""
        return self.record["slide"], self.record["scale"]["level0_mpp"]

    @property
    def sha256(self) -> str | None:
        """The hash of the bytes that its tiles were made from."""
        return (self.record.get("source_tiles") or {}).get("sha256")

    @property
    def empty(self) -> int:
        """Source tiles that its slide declares empty."""
        return int((self.record.get("source_tiles") or {}).get("empty", 0))

    def is_of(self, slide: SlideFacts, sha256: str | None, job: Job, settings: Settings) -> bool:
        """Whether it was made from this slide's content, at this scale.

        `sha256` is of the bytes of its tiles, where those were read again. Raises MismatchError if
        not, unless such bags are to be made again.
        """
        then = self.of_slide
        is_same = then == (slide.fingerprint, slide.mpp)
        if is_same and sha256 in (None, self.sha256):
            return True
        if settings.on_mismatch == "redo":
            return False
        if is_same:
            raise MismatchError(
                f"{job.output} is there already, but its slide was written since, and the bytes of"
                " its tiles are others than those that it was made from (was the slide damaged, or"
                " is it now?); give on_mismatch='redo' to make it again"
            )
        raise MismatchError(
            f"{job.output} is there already, but was made from other content or at another scale:"
            f" from {_described(*then)}, while the slide has"
            f" {_described(slide.fingerprint, slide.mpp)}; give on_mismatch='redo' to make it again"
        )


def _described(slide: Mapping[str, Any] | None, mpp: float | None) -> str:
    if slide is None:
        return f"an unknown file at {mpp} µm/px"
    return f"{slide['size_bytes']} bytes ({slide['content_sample_sha256'][:8]}) at {mpp} µm/px"


def _lost(provenance: Provenance, settings: Settings) -> list[str]:
    """Line saying that a bag lacks tiles, for damage or a region, where it may not; or none.

    That is no part of the fingerprint: such a bag may be mixed with others, but is incomplete.
    """
    lost = provenance.record.get("tiles", {}).get("damaged", 0)
    if (provenance.record.get("plan") or {}).get("roi_sha256"):
        return ["roi: a part of the slide there, all of it here"]
    return (
        [f"damaged: {lost} tiles dropped there, none here"]
        if lost and settings.damaged == "error"
        else []
    )


def find_earlier(job: Job, settings: Settings, expected: Provenance) -> Found | None:
    """The valid bag that is there already; None if there is none, or only a broken one.

    `expected` has the fingerprint that a bag made now would have. Raises MismatchError if it was
    made with something else, another program among that, and that is not to be redone; OutputError
    if there is a file that cannot be read now, which may be anything.
    """
    path = settings.out / job.output
    if not path.exists():
        return None
    try:
        bag = FeatureBag.load(path)
    except (NewerBagError, ForeignBagError) as error:
        differences = [str(error)]
    except UnreadableBagError as error:
        raise OutputError(f"what is there already is not replaced unread: {error}") from error
    except BagError as error:
        logger.warning("%s is not a valid bag and is made again: %s", job.output, error)
        return None
    else:
        if bag.provenance is None:
            differences = ["it has no provenance: another program wrote it"]
        else:
            differences = expected.differences(bag.provenance) + _lost(bag.provenance, settings)
            if not differences:
                return Found(len(bag), bag.provenance.record, bag.coverage)
    if settings.on_mismatch == "redo":
        return None
    raise MismatchError(
        f"{job.output} is there already, but was made differently:\n  "
        + "\n  ".join(differences)
        + "\nGive on_mismatch='redo' to make such files again, or another output folder"
    )


class Seen:
    """Versions of the slides that the bags in a folder were made from, or compared with.

    A version tells when a file was written, which may be when a patient was scanned. So it stands
    in a hidden file of the output folder and in no result; without that file, every version is
    unknown. A line is a JSON object; lines are only ever added, so that runs may share the folder.
    In a store the file is written when a run ends.
    """

    def __init__(self, out: Place) -> None:
        self._place = out / SEEN_NAME
        self._versions: dict[tuple[str, str], set[str]] = {}
        self._unwritten: list[str] = []
        with suppress(OSError, XmagError):
            for line in self._read().splitlines():
                self._take(line)

    def versions(self, job: Job, sha256: str | None) -> frozenset[str]:
        """The versions of a slide that had the bytes with this hash; none where it is unknown."""
        return frozenset(self._versions.get((str(job.output), sha256 or ""), ()))

    def add(self, job: Job, sha256: str | None, version: str | None) -> None:
        """Note that a version of a slide has the bytes with this hash."""
        known = self._versions.setdefault((str(job.output), sha256 or ""), set())
        if sha256 is None or version is None or version in known:
            return
        known.add(version)
        fields = {"output": str(job.output), "sha256": sha256, "version": version}
        self._unwritten.append(json.dumps(fields))
        if isinstance(self._place, Path):
            self.write()

    def write(self) -> None:
        """Write what was added. Where that fails, the next run does not know of it."""
        lines, self._unwritten = self._unwritten, []
        if not lines:
            return
        text = "".join(f"\n{line}\n" for line in lines)  # whatever a killed run left half written
        try:
            if isinstance(self._place, Url):
                with retold(OutputError, self._place):
                    self._place.write((self._read() + text).encode())
                return
            fd = self._opened(os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            with os.fdopen(fd, "wb", buffering=0) as file:
                file.write(text.encode())
        except (OSError, XmagError) as error:
            logger.warning("%s cannot be written: %s", self._place.name, error)

    def _read(self) -> str:
        if isinstance(self._place, Url):
            with retold(OutputError, self._place):
                return self._place.read().decode() if self._place.exists() else ""
        with os.fdopen(self._opened(os.O_RDONLY), encoding="utf-8", errors="replace") as file:
            return file.read()

    def _opened(self, flags: int) -> int:
        assert isinstance(self._place, Path)
        fd = os.open(self._place, flags | _OPEN, 0o666)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        raise OSError(f"{self._place.name} is no file")

    def _take(self, line: str) -> None:
        with suppress(ValueError, LookupError, TypeError):
            fields = json.loads(line)
            key = (str(fields["output"]), str(fields["sha256"]))
            self._versions.setdefault(key, set()).add(str(fields["version"]))


def earlier_of(
    found: Found, job: Job, settings: Settings, seen: Seen, *, thumbnail: bool
) -> Earlier:
    """A slide as it was when its bag was made, with the comparisons wanted now."""
    content, mpp = found.of_slide
    return Earlier(
        content=None if content is None else dict(content),
        mpp=mpp,
        thumbnail=thumbnail,
        redo=settings.on_mismatch == "redo",
        sha256=found.sha256,
        versions=seen.versions(job, found.sha256),
    )


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
