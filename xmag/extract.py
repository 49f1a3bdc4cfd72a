"""Features of one slide: `extract_features`, from a slide to its FeatureBag."""

import platform
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xmag.bag import FeatureBag
from xmag.encoder import Encoder, TileEncoder, default_encoder, load_model
from xmag.errors import DamagedSlideError, InputError, ModelError, XmagWarning
from xmag.grid import Border
from xmag.hub.registry import DEFAULT_MODEL
from xmag.masks import MASK_SUFFIXES, tissue_of
from xmag.plan import TilePlan, plan_tiles, warn_of_lost_tissue
from xmag.progress import ProgressOption, progress_bar, tell
from xmag.provenance import Provenance, mixing_fingerprint
from xmag.slide import Slide, SlideFacts
from xmag.tiles.arena import Tiles
from xmag.tiles.decoding import Damaged, Reading
from xmag.tiles.stream import check_damaged, read_rows
from xmag.tissue import TissueMask
from xmag.urls import base_name

Transform = Callable[[Tiles], Tiles]
"""Transform of tiles, uint8 (B, S, S, 3) to the same shape and type, as for stain normalisation."""

TissueChoice = TissueMask | str | PathLike[str] | None
"""Tissue to take tiles from: "auto" finds it, None takes every tile; or the path of a mask."""


def extract_features(
    slide: Slide | str | PathLike[str],
    *,
    model: TileEncoder | str | None = None,
    tissue: TissueChoice = "auto",
    plan: TilePlan | None = None,
    mpp: float | None = None,
    region: int | None = None,
    min_tissue: float | None = 0.25,
    overlap: int = 0,
    border: Border = "shift",
    roi: Any = None,
    batch_size: int | None = None,
    progress: ProgressOption = None,
    transform: Transform | None = None,
    damaged: Damaged = "error",
) -> FeatureBag:
    """FeatureBag of a slide: the embeddings of its tiles, their coordinates and provenance.

    Args:
        slide: An open Slide, or the path of one, which is opened and closed again.
        model: An encoder, a name or path for `load_model`, or None for the default model.
        tissue: "auto" finds the tissue, None takes every tile, or a TissueMask; or the path of one,
            .geojson, .json or .png, as for `extract_cohort`.
        plan: The tiles to embed, from `plan_tiles`; `tissue`, `min_tissue`, `overlap`, `border`
            and `roi` are then not looked at.
        mpp: µm/px of level 0, where the file's own is missing or wrong. With a path only.
        region: Which scan, where a file holds several. With a path only.
        min_tissue: As `plan_tiles` has it: smallest fraction of a tile's area that is tissue.
        overlap: As `plan_tiles` has it: output px that neighbouring tiles share.
        border: As `plan_tiles` has it: "shift" or "drop".
        roi: As `plan_tiles` has it: the region of interest, GeoJSON.
        batch_size: Tiles a batch; by default 256 on an accelerator and 32 on a CPU.
        progress: Show a bar on stderr; None does on a terminal and in a notebook. A function is
            called with each `xmag.progress.ProgressEvent` instead.
        transform: Applied to each batch of tiles, for instance to normalise stains.
        damaged: What becomes of tiles some of whose bytes do not decode: "error" raises, "drop"
            leaves them out, warns, and counts them in the provenance. No pixel is made up in
            either case.

    Returns:
        A bag of float32 (N, D) features, row i for the tile at ``bag.coords[i]``. A slide without
        tiles gives an empty bag and a warning; so do tiles that cover less than 0.9 of the tissue.

    Raises:
        SlideError: The slide cannot be read at the scale of the model; DamagedSlideError where
            tiles are damaged, with "drop" where all of them are, or the overview that tissue is
            found on.
        ModelError: The model cannot be loaded, or gives values that are not finite.
        InputError: Arguments that contradict each other.
    """
    is_choice = isinstance(tissue, TissueMask | None)
    if isinstance(tissue, str | PathLike):
        is_choice = tissue == "auto" or Path(tissue).suffix in MASK_SUFFIXES
    if not is_choice:
        seen = repr(tissue) if isinstance(tissue, str) else f"a {type(tissue).__name__}"
        raise InputError(
            f"tissue is {seen}; expected 'auto', None (every tile), a .geojson, .json or .png"
            " file, or a TissueMask: TissueMask.from_array(mask, slide) makes one of a mask of"
            " your own"
        )
    check_damaged(damaged)
    with ExitStack() as stack:
        if isinstance(slide, Slide):
            for name, given in (("mpp", mpp), ("region", region)):
                if given is not None:
                    raise InputError(
                        f"{name}= goes with a path; for an open slide use Slide(path, {name}=...)"
                    )
        else:
            slide = stack.enter_context(Slide(slide, mpp=mpp, region=region))
        # After the slide: the model may have to be fetched.
        tell_of_loading(model, progress)
        encoder = resolve_encoder(model)
        if plan is None:
            plan = plan_tiles(
                slide, encoder.tile_spec, tissue=tissue_of(slide, tissue), min_tissue=min_tissue,
                overlap=overlap, border=border, roi=roi,
            )  # fmt: skip
        elif plan.spec != encoder.tile_spec:
            raise InputError(
                f"the plan is for {plan.spec}, but the model wants {encoder.tile_spec}; make the"
                " plan with plan_tiles(slide, encoder.tile_spec)"
            )
        if len(plan) == 0:
            dropped = ", ".join(f"{len(v)} {k}" for k, v in plan.dropped.items() if len(v))
            warnings.warn(
                f"{slide.name!r} has no tile to embed (dropped cells: {dropped or 'none'}); its bag"
                " is empty",
                XmagWarning,
                stacklevel=2,
            )
        return _embed_plan(
            slide,
            plan,
            encoder,
            batch_size=default_batch_size(encoder) if batch_size is None else batch_size,
            progress=progress,
            transform=transform,
            damaged=damaged,
        )


def _embed_plan(
    slide: Slide,
    plan: TilePlan,
    encoder: TileEncoder,
    *,
    batch_size: int,
    progress: ProgressOption,
    transform: Transform | None,
    damaged: Damaged,
) -> FeatureBag:
    """The bag of the tiles of a plan; `extract_features` without its choices."""
    features = np.empty((len(plan), encoder.embed_dim), np.float32)
    lost = np.ones(len(plan), np.bool_)
    readings: list[Reading] = []

    def batches() -> Iterator[tuple[NDArray[np.int64], Tiles]]:
        read = read_rows(slide, plan, batch_size=batch_size, damaged=damaged, note=readings.append)
        for rows, tiles in read:
            lost[rows] = False
            yield rows, transformed(tiles, transform)

    vectors: Iterable[NDArray[np.float32]]
    if isinstance(encoder, Encoder):
        vectors = (found for _, found in encoder.embed_stream(batches()))
    else:
        vectors = (embedded(encoder, tiles) for _, tiles in batches())
    with progress_bar(progress, total=len(plan), desc=slide.name, unit="tile") as bar:
        done = 0
        for found in vectors:
            features[done : done + len(found)] = found
            done += len(found)
            bar.update(len(found))
    return bag_of(
        features[:done],
        without_damaged(plan, lost, slide.name),
        slide.facts,
        encoder,
        transform=transform,
        damaged=damaged,
        reading=readings[0],
    )


def without_damaged(plan: TilePlan, lost: NDArray[np.bool_], name: str) -> TilePlan:
    """The plan less the tiles that were damaged, with a warning; the same where none was.

    Raises DamagedSlideError where none is left.
    """
    count = int(np.count_nonzero(lost))
    if not count:
        return plan
    if count == len(plan):
        raise DamagedSlideError(
            f"all {count} tiles of {name} are damaged; expected some to be left. Copy the"
            " file again"
        )
    warnings.warn(
        f"{count} of {len(plan)} tiles of {name!r} are damaged and left out, as damaged='drop' asks"
        " for; copy the file again to have them",
        XmagWarning,
        stacklevel=3,
    )
    return plan.without(lost)


def bag_of(
    features: NDArray[np.float32],
    plan: TilePlan,
    slide: SlideFacts,
    encoder: TileEncoder,
    *,
    transform: Transform | None,
    damaged: Damaged = "error",
    reading: Reading | None = None,
) -> FeatureBag:
    """The bag of embeddings, float32 (N, D), of a plan's tiles, with its provenance.

    Warns where the tiles cover less than 0.9 of the tissue. Raises ModelError where a value is not
    finite.
    """
    warn_of_lost_tissue(plan, slide.name)
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise ModelError(
            f"the model gave values that are not finite for {slide.name!r} (first at tile {row},"
            f" level-0 {tuple(plan.coords[row].tolist())}); try dtype='float32', and check the"
            " weights"
        )
    provenance = Provenance(
        fingerprint=fingerprint_of(encoder, plan.options, transform),
        record=_record(slide, plan, encoder, damaged, reading),
    )
    return FeatureBag(features, plan.coords, provenance=provenance, tiles=plan.tiles)


def resolve_encoder(model: TileEncoder | str | None) -> TileEncoder:
    """The encoder that `model=` means: itself, one loaded by name, or the default one."""
    if model is None:
        return default_encoder()
    if isinstance(model, str | PathLike):
        return load_model(model)
    if not isinstance(model, TileEncoder):
        raise InputError(
            f"model is a {type(model).__name__}; expected a name, a path, or an object with"
            " tile_spec, embed_dim, embed and provenance"
        )
    return model


def tell_of_loading(model: Any, progress: ProgressOption) -> None:
    """Say which models are loaded now, of those given by name."""
    for one in model if isinstance(model, list | tuple) else [model]:
        if one is None or isinstance(one, str | PathLike):
            tell(progress, f"loading {base_name(DEFAULT_MODEL if one is None else one)}")


def default_batch_size(encoder: TileEncoder) -> int:
    """Default number of tiles a batch: 256 fill an accelerator, 32 stay in a CPU's caches."""
    device = getattr(encoder, "device", None)
    return 32 if device is None or getattr(device, "type", "cpu") == "cpu" else 256


def fingerprint_of(
    encoder: TileEncoder, plan_options: Mapping[str, Any], transform: Transform | None
) -> dict[str, Any]:
    """Fingerprint that decides whether two bags may be mixed; what is a slide's own does not."""
    # Embeddings pooled otherwise are others; those of the class token were the only ones before.
    pooling = getattr(encoder, "pooling", "token")
    pooled = {} if pooling == "token" else {"pooling": pooling}
    plan = {k: v for k, v in plan_options.items() if k != "roi_sha256"}
    if plan.get("tissue") is not None:
        plan["tissue"] = {k: v for k, v in plan["tissue"].items() if k != "sha256"}
    return pooled | mixing_fingerprint(
        weights_sha256=encoder.provenance["weights_sha256"],
        tile_spec=encoder.tile_spec.to_dict(),
        plan=plan,
        dtype=str(getattr(encoder, "dtype", "float32")),
        transform=None if transform is None else name_of(transform),
    )


def transformed(tiles: Tiles, transform: Transform | None) -> Tiles:
    """Tiles after the user's transform; InputError where that returns something else."""
    if transform is None:
        return tiles
    changed = np.asarray(transform(tiles))
    if changed.shape != tiles.shape or changed.dtype != np.uint8:
        raise InputError(
            f"transform {name_of(transform)} returned {changed.dtype} {changed.shape};"
            f" expected uint8 {tiles.shape}"
        )
    return changed


def embedded(encoder: TileEncoder, tiles: Tiles) -> NDArray[np.float32]:
    """The embeddings of a batch, float32 (B, D); ModelError where the encoder returns others."""
    result: Any = encoder.embed(tiles)
    # numpy takes a tensor only from the CPU, and an array has no device to come from.
    vectors = np.asarray(result.cpu() if hasattr(result, "cpu") else result, np.float32)
    if vectors.shape != (len(tiles), encoder.embed_dim):
        raise ModelError(
            f"the encoder returned {vectors.shape} for {len(tiles)} tiles; expected"
            f" ({len(tiles)}, {encoder.embed_dim}), as its embed_dim says"
        )
    return vectors


def _record(
    slide: SlideFacts,
    plan: TilePlan,
    encoder: TileEncoder,
    damaged: Damaged,
    reading: Reading | None,
) -> dict[str, Any]:
    """Record of how a bag was made; nothing that tells who, where, or whose slide it is."""
    scale = plan.scale
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "xmag": version("xmag"),
        "torch": version("torch"),
        "python": platform.python_version(),
        "device": getattr(getattr(encoder, "device", None), "type", None),
        "dtype": str(getattr(encoder, "dtype", "float32")).removeprefix("torch."),
        "model": dict(encoder.provenance),
        "slide": None if slide.fingerprint is None else dict(slide.fingerprint),
        "scale": {
            "format": slide.format,
            "level0_mpp": slide.mpp,
            "mpp_source": slide.mpp_source,
            "level": scale.level,
            "reduction": scale.reduction,
            "decoded_mpp": scale.decoded_mpp,
            "effective_mpp": scale.mpp,
            "resampled": scale.factor != 1.0,
        },
        "plan": dict(plan.options),
        "damaged": damaged,
        "tiles": {
            "kept": len(plan),
            "for_piece": int(np.count_nonzero(plan.for_piece)),
            **{k: len(v) for k, v in plan.dropped.items()},
        },
        "source_tiles": None if reading is None else asdict(reading),
        "tissue": None
        if plan.tissue is None
        else {
            "coverage": plan.coverage,
            "mm2": plan.tissue.area_mm2,
            "uncovered_mm2": plan.uncovered_mm2,
            "too_small_pieces": plan.tissue.too_small_pieces,
        },
    }


def name_of(transform: Transform) -> str:
    """Name of a transform in a provenance: its module, and its name there."""
    kind = transform if hasattr(transform, "__qualname__") else type(transform)
    return f"{kind.__module__}.{kind.__qualname__}"
