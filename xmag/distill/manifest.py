"""Manifest: the list of the training regions, by slide and coordinates.

It is a file of numbers and relative paths, so that it can be counted, kept, published, and read
again beside the slides wherever they lie.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xmag import records
from xmag.distill.views import HIGH_MPP, REGION_PX
from xmag.errors import InputError
from xmag.files import write_text
from xmag.geometry import TileSpec

REGION_SPEC = TileSpec(mpp=HIGH_MPP, size_px=REGION_PX)
"""Tile specification of a region; `resample` is the kernel for slides of another scale."""

_FORMAT = records.Format(
    name="xmag-regions", version=1, writer="Manifest.save", remedy="make the manifest again"
)

_HELD_OUT = 0x4E1D
"""Salt of the random stream that draws held-out sources from the seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestSource:
    """Slide or image that regions are read from.

    `path` is relative to the root that is given when it is read, with slashes. `fingerprint` is
    `xmag.provenance.file_fingerprint`'s, `mpp` the µm/px of level 0 and `mpp_source` who says so,
    `size` (width, height) in level-0 px, and `region_mpp` the scale of what is read: that of the
    decoded px where they are within the tolerance, else exactly what was asked for. `candidates`
    is the number of regions that could have been sampled.
    """

    path: str
    site: str
    fingerprint: Mapping[str, Any]
    mpp: float
    mpp_source: str
    size: tuple[int, int]
    region_mpp: float
    candidates: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Region: the index of its source in `Manifest.sources`, its corner in level-0 px."""

    source: int
    x: int
    y: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest:
    """Regions to train on, in a fixed order: a region's number is its id.

    `places` is int64 (N, 3), a row (source, x, y) a region, read-only. `spec` is the tile
    specification, `options` are those of the sampling, and `refused` lists files left out: (path,
    reason). Raises InputError where a region names no source.
    """

    spec: TileSpec
    sources: tuple[ManifestSource, ...]
    places: NDArray[np.int64]
    options: Mapping[str, Any]
    refused: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        places = np.array(self.places, np.int64).reshape(-1, 3)
        if len(places) and not (places.min() >= 0 and int(places[:, 0].max()) < len(self.sources)):
            raise InputError(
                f"a region has a negative number or names a source that is not among the"
                f" {len(self.sources)} of the manifest; make it again"
            )
        places.setflags(write=False)
        object.__setattr__(self, "places", places)

    def __len__(self) -> int:
        """The number of regions."""
        return len(self.places)

    def region(self, index: int) -> Region:
        """The region with this number."""
        source, x, y = self.places[index].tolist()
        return Region(source=source, x=x, y=y)

    @property
    def regions(self) -> tuple[Region, ...]:
        """All regions by number."""
        return tuple(Region(source=s, x=x, y=y) for s, x, y in self.places.tolist())

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites, in alphabetical order."""
        return tuple(sorted({source.site for source in self.sources}))

    def counts(self) -> dict[str, Any]:
        """Counts of slides and regions, in all and per site, as plain JSON values.

        "slides" counts those that regions come from, "empty" those without any, "refused" those
        that cannot be read at the scale; "teacher_tiles" is 16 a region.
        """
        per_source = np.bincount(self.places[:, 0], minlength=len(self.sources)).tolist()
        sites: dict[str, dict[str, int]] = {
            site: {"slides": 0, "empty": 0, "regions": 0} for site in self.sites
        }
        for source, regions in zip(self.sources, per_source, strict=True):
            found = sites[source.site]
            found["slides" if regions else "empty"] += 1
            found["regions"] += regions
        total = {key: sum(site[key] for site in sites.values()) for key in ("slides", "empty")}
        tiles = len(self) * (self.spec.size_px // 224) ** 2
        return {
            **total,
            "refused": len(self.refused),
            "regions": len(self),
            "teacher_tiles": tiles,
            "sites": sites,
        }

    def to_json(self) -> str:
        """The manifest as JSON text, byte for byte the same for the same manifest."""
        by_source = [self.places[self.places[:, 0] == n] for n in range(len(self.sources))]
        if not np.array_equal(np.concatenate([self.places[:0], *by_source]), self.places):
            raise InputError("the regions are not in the order of their sources; sort them")
        entries = [
            {**records.plain(source), "regions": places[:, 1:].tolist()}
            for source, places in zip(self.sources, by_source, strict=True)
        ]
        fields = {
            "spec": self.spec.to_dict(),
            "options": dict(self.options),
            "refused": [list(pair) for pair in self.refused],
            "sources": entries,
        }
        return _FORMAT.dumps(fields, sort_keys=True)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the JSON text, which identifies the manifest."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the manifest as JSON. Raises OutputError where that is not possible."""
        write_text(path, self.to_json() + "\n")

    @classmethod
    def from_json(cls, text: str, *, name: str = "the text") -> "Manifest":
        """Manifest from a text of `to_json`; InputError, with `name`, for anything else."""
        return cls._read(_FORMAT.loads(text, name), name)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Manifest":
        """Load the manifest from a file. Raises InputError where it holds none."""
        return cls._read(_FORMAT.load(path), repr(os.fspath(path)))

    @classmethod
    def _read(cls, fields: Mapping[str, Any], name: str) -> "Manifest":
        with _FORMAT.reading(name):
            places = [
                (number, int(x), int(y))
                for number, entry in enumerate(fields["sources"])
                for x, y in entry.pop("regions")
            ]
            return cls(
                spec=TileSpec.from_dict(fields["spec"]),
                sources=tuple(
                    records.from_dict(ManifestSource, entry, f"sources[{number}]")
                    for number, entry in enumerate(fields["sources"])
                ),
                places=np.array(places, np.int64).reshape(-1, 3),
                options=fields["options"],
                refused=tuple((path, reason) for path, reason in fields["refused"]),
            )


def held_out(
    manifest: Manifest, *, fraction: float, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training and validation split: sorted numbers of the regions of each.

    Whole sources are held out, at least one, drawn at random site by site, until they hold
    `fraction` of the regions or more. Raises InputError where that leaves nothing to train on.
    """
    if not 0 < fraction < 1:
        raise InputError(f"fraction is {fraction!r}; expected a number between 0 and 1")
    rng = np.random.default_rng(np.random.SeedSequence((seed, _HELD_OUT)))
    per_source = np.bincount(manifest.places[:, 0], minlength=len(manifest.sources))
    by_site: dict[str, list[int]] = {site: [] for site in manifest.sites}
    for number in rng.permutation(len(manifest.sources)).tolist():
        if per_source[number]:
            by_site[manifest.sources[number].site].append(number)
    # Site by site, so that each gives about as many sources as any other.
    turns = [
        numbers[turn]
        for turn in range(max(map(len, by_site.values()), default=0))
        for numbers in by_site.values()
        if turn < len(numbers)
    ]
    chosen: list[int] = []
    while turns and per_source[chosen].sum() < fraction * len(manifest):
        chosen.append(turns.pop(0))
    inside = np.isin(manifest.places[:, 0], chosen)
    if inside.all():
        raise InputError(
            f"{len(chosen)} slides hold all {len(manifest)} regions; none is left to train on once"
            f" {fraction:.0%} of them are held out. Add slides, or hold out less"
        )
    return np.flatnonzero(~inside), np.flatnonzero(inside)


def shuffled(
    sources: NDArray[np.int64] | Sequence[int], rng: np.random.Generator, *, at_once: int = 64
) -> NDArray[np.int64]:
    """Shuffled order of regions, int64 (N,), that needs at most `at_once` open sources.

    `sources` is the source of each region, ``manifest.places[:, 0]``. The sources are shuffled and
    dealt into groups of `at_once`, and the regions of a group are shuffled; so a slide is opened
    once an epoch, while each batch still mixes many.
    """
    if at_once < 1:
        raise InputError(f"at_once is {at_once!r}; expected at least 1 source")
    sources = np.asarray(sources, np.int64)
    numbers, inverse = np.unique(sources, return_inverse=True)
    group = rng.permutation(len(numbers))[inverse] // at_once
    mixed = rng.permutation(len(sources))
    return mixed[np.argsort(group[mixed], kind="stable")]
