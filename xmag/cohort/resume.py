"""Bags of an earlier run that are still valid, and need not be made again."""

import json
import logging
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from xmag.bag import FeatureBag, NewerBagError
from xmag.bag.formats import ForeignBagError, UnreadableBagError
from xmag.cohort.jobs import Job, Settings
from xmag.errors import BagError, MismatchError, OutputError, XmagError
from xmag.provenance import Provenance
from xmag.slide import SlideFacts
from xmag.tiles.decoder import Earlier
from xmag.urls import Place, Url, retold

logger = logging.getLogger(__name__)

SEEN_NAME = ".xmag-seen.jsonl"
_OPEN = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
"""Flags for opening: another user of the folder may have put a link or a FIFO there."""


@dataclass(frozen=True, slots=True)
class Found:
    """A valid bag that is there: its number of tiles, its record, and its coverage."""

    tiles: int
    record: Mapping[str, Any]
    coverage: float | None

    @classmethod
    def of(cls, bag: FeatureBag) -> "Found":
        """The facts of a bag that xmag made."""
        assert bag.provenance is not None
        return cls(len(bag), bag.provenance.record, bag.coverage)

    @property
    def sha256(self) -> str | None:
        """The hash of the bytes that its tiles were made from."""
        return (self.record.get("source_tiles") or {}).get("sha256")

    @property
    def empty(self) -> int:
        """Source tiles that its slide declares empty."""
        return int((self.record.get("source_tiles") or {}).get("empty", 0))


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
            differences = expected.differences(bag.provenance) + _lost(
                bag.provenance, job, settings
            )
            if not differences:
                return Found.of(bag)
    if settings.on_mismatch == "redo":
        return None
    raise MismatchError(
        f"{job.output} is there already, but was made differently:\n  "
        + "\n  ".join(differences)
        + "\nGive on_mismatch='redo' to make such files again, or another output folder"
    )


def _lost(provenance: Provenance, job: Job, settings: Settings) -> list[str]:
    """Line saying that a bag has other tiles, for damage, a region or a mask; or none.

    That is no part of the fingerprint: such a bag may be mixed with others, but is incomplete.
    """
    plan = provenance.record.get("plan") or {}
    mask_sha256 = (plan.get("tissue") or {}).get("sha256")
    if job.tissue_sha256 not in (None, mask_sha256):  # of any other tissue the fingerprint tells
        there, here = ((mask or "unknown")[:8] for mask in (mask_sha256, job.tissue_sha256))
        return [f"tissue: the given mask is another one, sha256 {there} there, {here} here"]
    roi_sha256 = plan.get("roi_sha256")
    if roi_sha256 != job.roi_sha256:
        there = "all of the slide" if roi_sha256 is None else "a part of the slide"
        here = "another part of it" if roi_sha256 else "a part of it"
        return [f"roi: {there} there, {'all of it' if job.roi_sha256 is None else here} here"]
    lost = provenance.record.get("tiles", {}).get("damaged", 0)
    if lost and settings.damaged == "error":
        return [f"damaged: {lost} tiles dropped there, none here"]
    return []


def changed_slide(earlier: Earlier, slide: SlideFacts, job: Job) -> MismatchError:
    """The error for a bag that was made from other content than the slide has now."""
    if (earlier.content, earlier.mpp) == (slide.fingerprint, slide.mpp):
        return MismatchError(
            f"{job.output} is there already, but its slide was written since, and the bytes of"
            " its tiles are others than those that it was made from (was the slide damaged, or"
            " is it now?); give on_mismatch='redo' to make it again"
        )
    return MismatchError(
        f"{job.output} is there already, but was made from other content or at another scale:"
        f" from {_described(earlier.content, earlier.mpp)}, while the slide has"
        f" {_described(slide.fingerprint, slide.mpp)}; give on_mismatch='redo' to make it again"
    )


def _described(slide: Mapping[str, Any] | None, mpp: float | None) -> str:
    if slide is None:
        return f"an unknown file at {mpp} µm/px"
    scan = f", region {region}" if (region := slide.get("region")) else ""
    content = f"{slide['size_bytes']} bytes ({slide['content_sample_sha256'][:8]}{scan})"
    return f"{content} at {mpp} µm/px"


class JsonLines:
    """A file of JSON objects, a line each. Lines are only ever added, so that runs may share it.

    A store has no adding: there the file is written anew.
    """

    def __init__(self, place: Place) -> None:
        self._place, self._read_chars = place, 0

    def add(self, objects: list[dict[str, Any]]) -> None:
        """Add objects. Where that fails the log says so: what they tell is not known, then."""
        # A line break before each: whatever a killed run left half written.
        text = "".join(f"\n{json.dumps(each)}\n" for each in objects)
        try:
            if isinstance(self._place, Url):
                with retold(OutputError, self._place):
                    self._place.write((self._text() + text).encode())
                return
            with self._opened(os.O_WRONLY | os.O_APPEND | os.O_CREAT) as file:
                file.write(text.encode())
        except (OSError, XmagError) as error:
            logger.warning("%s cannot be written: %s", self._place.name, error)

    def news(self) -> Iterator[dict[str, Any]]:
        """The objects that were added since the last call; none while they cannot be read."""
        text = ""
        with suppress(OSError, XmagError):
            text = self._text()
        start, self._read_chars = self._read_chars, max(self._read_chars, text.rfind("\n") + 1)
        for line in text[start : self._read_chars].splitlines():
            with suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict):
                    yield found

    def _text(self) -> str:
        if isinstance(self._place, Url):
            with retold(OutputError, self._place):
                return self._place.read().decode() if self._place.exists() else ""
        with self._opened(os.O_RDONLY) as file:
            return file.read().decode(errors="replace")

    def _opened(self, flags: int) -> FileIO:
        assert isinstance(self._place, Path)
        fd = os.open(self._place, flags | _OPEN, 0o666)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return FileIO(fd, "r" if flags == os.O_RDONLY else "w")
        os.close(fd)
        raise OSError(f"{self._place.name} is no file")


class Seen:
    """Versions of the slides that the bags in a folder were made from, or compared with.

    A version tells when a file was written, which may be when a patient was scanned. So it stands
    in a hidden file of the output folder and in no result; without that file, every version is
    unknown. In a store the file is written when a run ends.
    """

    def __init__(self, out: Place) -> None:
        self._lines, self._is_store = JsonLines(out / SEEN_NAME), isinstance(out, Url)
        self._versions: dict[tuple[str, str], set[str]] = {}
        self._unwritten: list[dict[str, Any]] = []
        for line in self._lines.news():
            with suppress(LookupError):
                key = (str(line["output"]), str(line["sha256"]))
                self._versions.setdefault(key, set()).add(str(line["version"]))

    def versions(self, job: Job, sha256: str | None) -> frozenset[str]:
        """The versions of a slide that had the bytes with this hash; none where it is unknown."""
        return frozenset(self._versions.get((str(job.output), sha256 or ""), ()))

    def add(self, job: Job, sha256: str | None, version: str | None) -> None:
        """Note that a version of a slide has the bytes with this hash."""
        known = self._versions.setdefault((str(job.output), sha256 or ""), set())
        if sha256 is None or version is None or version in known:
            return
        known.add(version)
        line = {"output": str(job.output), "sha256": sha256, "version": version}
        self._unwritten.append(line)
        if not self._is_store:
            self.write()

    def write(self) -> None:
        """Write what was added. Where that fails, the next run does not know of it."""
        lines, self._unwritten = self._unwritten, []
        if lines:
            self._lines.add(lines)


def earlier_of(
    found: Found, job: Job, settings: Settings, seen: Seen, *, thumbnail: bool
) -> Earlier:
    """A slide as it was when its bag was made, with the comparisons wanted now."""
    content = found.record["slide"]
    return Earlier(
        content=None if content is None else dict(content),
        mpp=found.record["scale"]["level0_mpp"],
        thumbnail=thumbnail,
        redo=settings.on_mismatch == "redo",
        sha256=found.sha256,
        versions=seen.versions(job, found.sha256),
    )
