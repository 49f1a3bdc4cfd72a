"""Training regions of slides: sampled once, listed in a manifest, and split for validation.

A manifest is a file of numbers and relative paths, so that it can be counted, kept, published, and
read again beside the slides wherever they lie.
"""

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from xmag import records
from xmag.distill.views import HIGH_MPP, REGION_PX, TILE_PX
from xmag.errors import (
    DamagedSlideError,
    InputError,
    SlideError,
    SlideScaleError,
    UnsupportedSlideError,
    XmagWarning,
)
from xmag.files import write_text
from xmag.geometry import TileSpec
from xmag.metrics.labels import as_labels
from xmag.plan import Coords, plan_options, plan_tiles
from xmag.progress import ProgressOption, progress_bar
from xmag.provenance import PREPROCESSING_VERSION, file_fingerprint
from xmag.slide import Slide, is_slide_path
from xmag.tiles.stream import default_threads
from xmag.tissue import TISSUE_METHOD, find_tissue

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


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
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

    def __repr__(self) -> str:
        sites = f"{len(self.sources):,} slides of {len(self.sites):,} sites"
        return f"<Manifest of {len(self):,} regions from {sites}, at {self.spec.mpp:g} µm/px>"

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
        return {
            "slides": sum(site["slides"] for site in sites.values()),
            "empty": sum(site["empty"] for site in sites.values()),
            "refused": len(self.refused),
            "regions": len(self),
            "teacher_tiles": len(self) * (self.spec.size_px // TILE_PX) ** 2,
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
        fields = {"spec": self.spec, "options": self.options, "refused": self.refused}
        return _FORMAT.dumps({**records.plain(fields), "sources": entries}, sort_keys=True)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the JSON text, which identifies the manifest."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the manifest as JSON. Raises OutputError where that is not possible."""
        write_text(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Manifest":
        """Load the manifest from a file. Raises InputError where it holds none."""
        fields = _FORMAT.load(path)
        with _FORMAT.reading(repr(os.fspath(path))):
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
    turns = [n for turn in zip_longest(*by_site.values()) for n in turn if n is not None]
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


Paths = str | PathLike[str] | Iterable[str | PathLike[str]]
Sites = Mapping[str, str] | Callable[[str], str]
"""Mapping or function from a source's path, relative to the root, to its site."""

_Look = Callable[[Slide, np.random.Generator], tuple[Coords, int]]
"""Candidates of a slide: their corners in the order of the draw, and the number that exist."""

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}
_REFUSALS = (SlideScaleError, DamagedSlideError, UnsupportedSlideError)


def plan_slides(
    slides: Paths,
    *,
    regions: int | None = None,
    root: str | PathLike[str] | None = None,
    sites: Sites | None = None,
    mpp: float | None = None,
    tissue: Literal["auto"] | None = "auto",
    min_tissue: float = 0.5,
    overlap: int = 0,
    spec: TileSpec = REGION_SPEC,
    seed: int = 0,
    skip_refused: bool = False,
    progress: ProgressOption = None,
) -> Manifest:
    """Sample regions over the tissue of slides into a manifest.

    Candidates are the cells of each slide's grid of regions that hold enough tissue. Of these
    `regions` are drawn at random, as many from each site as from any other, and within a site as
    many from each slide, as far as they have them. The same slides, options and seed give the same
    manifest, whatever the order of the paths; a slide more or less changes only the numbers drawn
    from the others, not the order in which a slide's own are drawn.

    Args:
        slides: A folder, which is searched, or paths.
        regions: The number to draw; None takes every candidate.
        root: The folder that paths in the manifest are relative to; by default the folder given,
            or the deepest that holds all slides.
        sites: The site of a slide by its relative path, from a mapping or a function; by default
            the folder it lies in, relative to the root.
        mpp: µm per level-0 px, where the files' own are missing or wrong.
        tissue: "auto" finds the tissue; None takes every region.
        min_tissue: The smallest fraction of a region that tissue covers.
        overlap: Px of 0.5 µm that neighbouring candidates share.
        spec: Tile specification of a region: its `mpp_tolerance` and `resample` (kernel) may be
            chosen.
        seed: Of the draw.
        skip_refused: Go on without slides that cannot be used, and list them in
            `Manifest.refused`.
        progress: Show a bar on stderr; None does on a terminal and in a notebook. A function is
            called with each `xmag.progress.ProgressEvent` instead.

    Raises:
        SlideScaleError: A slide has no µm/px, or no detail of 0.5 µm/px: it is not upsampled.
        SlideError: A slide cannot be read.
        InputError: Arguments make no sense, or there is not a single region.
    """
    if tissue not in ("auto", None):
        raise InputError(f"tissue is {tissue!r}; expected 'auto' or None")

    def look(slide: Slide, rng: np.random.Generator) -> tuple[Coords, int]:
        mask = find_tissue(slide) if tissue == "auto" else None
        # Examples, not a census: none with less tissue, and none that shows the same px again.
        plan = plan_tiles(
            slide, spec, tissue=mask, overlap=overlap, min_tissue=min_tissue, border="drop"
        )
        coords = plan.coords[~plan.for_piece]
        return coords[rng.permutation(len(coords))], len(coords)

    method = TISSUE_METHOD if tissue == "auto" else None
    options = plan_options(
        overlap=overlap, min_tissue=min_tissue, border="drop", tissue_method=method
    )
    request = _Request("slides", slides, root, sites, mpp, spec, regions, seed, skip_refused)
    return _plan(request, look, options, progress)


def plan_images(
    images: Paths,
    *,
    mpp: float,
    regions: int,
    root: str | PathLike[str] | None = None,
    sites: Sites | None = None,
    spec: TileSpec = REGION_SPEC,
    seed: int = 0,
    skip_refused: bool = False,
    progress: ProgressOption = None,
) -> Manifest:
    """Sample random crops of large tiles (PNG and JPEG images of known µm/px) into a manifest.

    A crop may begin at any px. `regions` are shared among sites and images as `plan_slides` does;
    no crop is drawn twice. Tissue is not looked for: what is not to be learned is not to be in the
    folder. The arguments are those of `plan_slides`, and so are the errors.
    """

    def look(image: Slide, rng: np.random.Generator) -> tuple[Coords, int]:
        side = math.ceil(spec.size_px * image.scale_for(spec).mpp / mpp - 1e-6)
        across, down = (max(0, edge - side + 1) for edge in image.dimensions)
        count = across * down
        y, x = np.divmod(rng.choice(count, min(regions, count), replace=False), max(across, 1))
        return np.stack([x, y], axis=1).astype(np.int64), count

    request = _Request("images", images, root, sites, mpp, spec, regions, seed, skip_refused)
    return _plan(request, look, {}, progress)


@dataclass(frozen=True, slots=True)
class _Request:
    """Arguments that `plan_slides` and `plan_images` share; `kind` is "slides" or "images"."""

    kind: str
    paths: Paths
    root: str | PathLike[str] | None
    sites: Sites | None
    mpp: float | None
    spec: TileSpec
    regions: int | None
    seed: int
    skip_refused: bool

    def __post_init__(self) -> None:
        if (self.spec.mpp, self.spec.size_px) != (REGION_SPEC.mpp, REGION_SPEC.size_px):
            raise InputError(
                f"a region of {self.spec.size_px} px at {self.spec.mpp:g} µm/px is asked for;"
                f" expected {REGION_SPEC.size_px} px at {REGION_SPEC.mpp} µm/px, of which only"
                " mpp_tolerance and resample may be chosen"
            )
        if self.regions is not None and self.regions < 1:
            raise InputError(f"regions is {self.regions!r}; expected at least 1, or None for all")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed!r}; expected a number from 0 on")

    def files(self) -> tuple[Path, list[str]]:
        """The root, and the sorted paths of the files relative to it; InputError for none."""
        root, paths = self.root, self.paths
        if isinstance(paths, str | PathLike):
            folder = Path(paths)
            listed = [folder]
            if folder.is_dir():
                root = folder if root is None else root
                listed = [path for path in folder.rglob("*") if path.is_file() and self._is(path)]
        else:
            listed = [Path(path) for path in paths]
        if not listed:
            raise InputError(
                f"no {self.kind} in {paths!r}; expected a folder that holds some, or a list of"
                " paths"
            )
        if missing := [os.fspath(path) for path in listed if not path.is_file()]:
            raise InputError(f"there is no file {missing[0]!r}; check the path")
        absolute = [path.absolute() for path in listed]
        base = Path(root or os.path.commonpath([path.parent for path in absolute])).absolute()
        for path in absolute:
            if not path.is_relative_to(base):
                raise InputError(f"{os.fspath(path)!r} does not lie in root={os.fspath(base)!r}")
        return base, sorted({path.relative_to(base).as_posix() for path in absolute})

    def site(self, name: str) -> str:
        """The site of a file, by its path relative to the root."""
        if self.sites is None:
            return PurePosixPath(name).parent.as_posix()
        try:
            site = self.sites[name] if isinstance(self.sites, Mapping) else self.sites(name)
        except KeyError as error:
            raise InputError(
                f"sites names no site for {name!r}; expected one for each path relative to the root"
            ) from error
        if not isinstance(site, str):
            raise InputError(f"the site of {name!r} is {site!r}; expected a str")
        as_labels([site], f"sites({name!r})")  # no blanks around it, and not missing
        return site

    def _is(self, path: Path) -> bool:
        if self.kind == "slides":
            return is_slide_path(path)
        return path.suffix.lower() in _IMAGE_SUFFIXES and not path.name.startswith(".")


def _plan(
    request: _Request, look: _Look, options: Mapping[str, Any], progress: ProgressOption
) -> Manifest:
    """Manifest of regions drawn from the candidates that `look` finds in each file."""
    root, names = request.files()
    found: list[tuple[ManifestSource, Coords]] = []
    refused: list[tuple[str, SlideError]] = []
    with (
        ThreadPoolExecutor(default_threads(), thread_name_prefix="xmag-manifest") as pool,
        progress_bar(progress, total=len(names), desc="looking", unit="file") as bar,
    ):
        for name, result in zip(
            names, pool.map(lambda name: _looked(request, root, name, look), names), strict=True
        ):
            bar.update()
            if isinstance(result, SlideError):
                refused.append((name, result))
            else:
                found.append(result)
    if refused and not request.skip_refused:
        shown = "; ".join(f"{name}: {error}" for name, error in refused[:5])
        more = f"; and {len(refused) - 5} more" if len(refused) > 5 else ""
        raise type(refused[0][1])(
            f"{len(refused)} of {len(names)} files cannot be used: {shown}{more}. Leave them out,"
            " or let them be listed with skip_refused=True"
        )
    sources = [source for source, _ in found]
    _check_sources(sources, refused=len(refused))
    shares = _shares(sources, request.regions, request.seed)
    places = [
        (number, x, y)
        for number, ((_, drawn), share) in enumerate(zip(found, shares, strict=True))
        for y, x in sorted((y, x) for x, y in drawn[:share].tolist())
    ]
    return Manifest(
        spec=request.spec,
        sources=tuple(sources),
        places=np.array(places, np.int64),
        options={
            "kind": request.kind,
            **options,
            "regions": request.regions,
            "seed": request.seed,
            "preprocessing_version": PREPROCESSING_VERSION,
        },
        # Without folders: manifests are shared.
        refused=tuple(
            (name, str(e).replace(os.fspath(root / name), name).replace(os.fspath(root), "."))
            for name, e in refused
        ),
    )


def _looked(
    request: _Request, root: Path, name: str, look: _Look
) -> tuple[ManifestSource, Coords] | SlideError:
    """The source made of a file, and its candidates in the order of the draw; or the refusal."""
    site, fingerprint = request.site(name), file_fingerprint(root / name)
    # By its content, so that what is drawn from a slide does not depend on the others.
    content = int(fingerprint["content_sample_sha256"][:16], 16)
    rng = np.random.default_rng(np.random.SeedSequence((request.seed, content)))
    try:
        with Slide(root / name, mpp=request.mpp) as slide:
            scale = slide.scale_for(request.spec)
            drawn, candidates = look(slide, rng)
            assert slide.mpp is not None  # scale_for raises otherwise
            source = ManifestSource(
                path=name,
                site=site,
                fingerprint=fingerprint,
                mpp=slide.mpp,
                mpp_source=slide.mpp_source,
                size=slide.dimensions,
                region_mpp=scale.mpp,
                candidates=candidates,
            )
    except _REFUSALS as error:
        return error
    return source, drawn


def _check_sources(sources: Sequence[ManifestSource], *, refused: int) -> None:
    """Raise InputError for files of the same content, and where no file has a region."""
    by_content: dict[str, str] = {}
    for source in sources:
        other = by_content.setdefault(source.fingerprint["content_sample_sha256"], source.path)
        if other != source.path:
            raise InputError(
                f"{source.path!r} and {other!r} have the same content; leave one out, or it counts"
                " twice and may end up on both sides of a split"
            )
    if not any(source.candidates for source in sources):
        raise InputError(
            f"no region in {len(sources)} files ({refused} more cannot be used): expected tissue of"
            f" {REGION_SPEC.size_px * REGION_SPEC.mpp:g} µm a side somewhere. Lower min_tissue, or"
            " check the slides"
        )


def _shares(sources: Sequence[ManifestSource], regions: int | None, seed: int) -> list[int]:
    """The number of regions to take from each source, balanced by site, then by source."""
    if regions is None:
        return [source.candidates for source in sources]
    candidates = np.array([source.candidates for source in sources], np.int64)
    if candidates.sum() < regions:
        warnings.warn(
            f"{regions} regions were asked for, and there are {candidates.sum()} candidates: all"
            " are taken. Add slides, lower min_tissue, or let candidates overlap",
            XmagWarning,
            stacklevel=4,
        )
    rng = np.random.default_rng(np.random.SeedSequence((seed, len(sources))))
    _, site = np.unique([source.site for source in sources], return_inverse=True)
    capacity = np.bincount(site, weights=candidates).astype(np.int64)
    shares = np.zeros(len(sources), np.int64)
    for number, share in enumerate(fair_shares(capacity, regions, rng)):
        inside = site == number
        shares[inside] = fair_shares(candidates[inside], share, rng)
    return shares.tolist()


def fair_shares(
    capacity: Sequence[int] | NDArray[np.int64], total: int, rng: np.random.Generator
) -> list[int]:
    """Max-min fair shares of `total`: the smallest shares are as large as can be.

    Nobody gets more than its `capacity`; what does not divide goes to some at random.
    """
    shares = np.zeros(len(capacity), np.int64)
    room = np.asarray(capacity, np.int64)
    left = min(total, int(room.sum()))
    while left:
        open_ones = np.flatnonzero(shares < room)
        each = left // len(open_ones)
        if each == 0:
            open_ones, each = rng.permutation(open_ones)[:left], 1
        given = np.minimum(room[open_ones] - shares[open_ones], each)
        shares[open_ones] += given
        left -= int(given.sum())
    return shares.tolist()
