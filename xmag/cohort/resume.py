"""What is there already: which bags of an earlier run still count."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xmag.bag import FeatureBag, NewerBagError
from xmag.bag.formats import ForeignBagError, UnreadableBagError
from xmag.cohort.jobs import Job
from xmag.cohort.settings import Settings
from xmag.errors import BagError, MismatchError, OutputError
from xmag.provenance import Provenance
from xmag.slide import SlideFacts

logger = logging.getLogger(__name__)


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

    def is_of(self, slide: SlideFacts, job: Job, settings: Settings) -> bool:
        """Whether it was made from this slide's content, at this scale.

        Raises MismatchError if not, unless such bags are to be made again.
        """
        then = self.of_slide
        if then == (slide.fingerprint, slide.mpp):
            return True
        if settings.on_mismatch == "redo":
            return False
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
    """That tiles of a bag were dropped for damage, where they may not be; a line or none.

    It is no part of the fingerprint: such a bag may be mixed with others, but is not all there is.
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
