"""`finetune_slides`: fine-tune an encoder with a classifier, from slides and labels."""

import copy
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from xmag.devices import Float32, resolve_device, seeded
from xmag.encoder import Encoder, load_model
from xmag.errors import InputError, XmagWarning
from xmag.finetune.cohort import make_cohort, read_labels
from xmag.finetune.gradients import seed_of
from xmag.finetune.network import Network, TileNetwork, freeze, uses_half
from xmag.finetune.result import FinetuneResult, identity_of, lineage_of, make_result
from xmag.finetune.settings import Mode, Settings
from xmag.finetune.tilestore import SlideLike, TileOptions, TileStore, decoded, plan_slides
from xmag.finetune.trainer import Trainer
from xmag.hub.registry import DEFAULT_MODEL
from xmag.mil import aggregator as make_aggregator
from xmag.progress import ProgressOption, tell
from xmag.training import joined_ranks, warn_of_early_best
from xmag.training.splits import read_validation
from xmag.urls import base_name


def finetune_slides(
    slides: Sequence[SlideLike | TileStore],
    labels: Sequence[Any],
    *,
    model: Encoder | str | os.PathLike[str] | None = None,
    aggregator: str | nn.Module = "abmil",
    groups: Sequence[Any] | None = None,
    validation: float | tuple[Any, ...] | None = 0.2,
    mode: Mode = "exact",
    settings: Settings | None = None,
    tiles: TileOptions | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    random_state: int = 0,
    device: str | torch.device = "auto",
    progress: ProgressOption = None,
) -> FinetuneResult:
    """Fine-tune an encoder and an aggregator end to end, on slides and slide-level labels.

    Args:
        slides: Paths, open slides, or a TileStore for each.
        labels: One a slide, of any hashable kind; two classes or more.
        model: The encoder to start from, or its name or path for `load_model` (the default model
            by default). It stays as it is.
        aggregator: A name of `xmag.mil.AGGREGATORS`, or a module of their signature, trained
            already or not; it stays as it is.
        groups: The patient of each slide, so that none is on both sides of the validation split.
        validation: The share of slides to hold out, by patient and class; or (slides, labels) or
            (slides, labels, groups) of others. The weights of the epoch with the lowest validation
            loss are returned. None trains all epochs on all slides, and returns the last.
        mode: "exact" learns from every tile of a slide at each step, "sampled" from a random
            subset of `settings.sampled_tiles`.
        settings: Training hyperparameters.
        tiles: The selection of tiles in a slide, and the storage of decoded ones.
        checkpoint: The path of a file that the run writes after each epoch, and goes on from if it
            is there: the same call again takes up a run that was stopped.
        random_state: Decides all draws: split, order, augmentation, dropout, fresh weights.
        device: "auto" takes CUDA, then MPS, then the CPU; started by torchrun, each process takes
            its own GPU. An `Encoder` is trained on its own device where this is "auto".
        progress: Show a bar on stderr; None does on a terminal and in a notebook. A function is
            called with each `xmag.progress.ProgressEvent` instead.

    Returns:
        The encoder, the classifier, and the history.

    Raises:
        InputError: One class only, a label too few, slides without tiles, the same patient or
            slide on both sides of the split, arguments that make no sense.
        SlideError: A slide is missing or damaged; it is named, before any training.
        ModelError: The model cannot be loaded, the loss is not finite, or a single tile does not
            fit into memory.
        MismatchError: The checkpoint is of another run.
        OutputError: There is no room for the tiles, or no folder for the checkpoint.
    """
    settings, options, seed = settings or Settings(), tiles or TileOptions(), random_state
    if mode not in get_args(Mode):
        raise InputError(f"mode is {mode!r}; expected one of {', '.join(get_args(Mode))}")
    share, given = read_validation(validation, what="slides")
    others, *about_others = given or ((), (), None)
    found = read_labels(labels, groups, *about_others, slides=len(slides), others=len(others))
    with joined_ranks() as ranks:
        if settings.slides_per_step % ranks.world:
            raise InputError(
                f"slides_per_step is {settings.slides_per_step} for {ranks.world} processes;"
                " expected a multiple, so that each works on as many slides"
            )
        shown = progress if ranks.leads else False
        if not isinstance(model, Encoder):
            tell(shown, f"loading {base_name(DEFAULT_MODEL if model is None else model)}")
        encoder = _parent(model)
        if ranks.world > 1:
            where = ranks.device()
        elif device == "auto" and isinstance(model, Encoder):
            where = model.device
        else:
            where = resolve_device(device)
        sources = plan_slides(
            [*slides, *others], spec=encoder.tile_spec, options=options, progress=shown
        )
        cohort = make_cohort(
            sources, found, share=share, class_weight=settings.class_weight, seed=seed
        )
        network = _network(
            encoder, aggregator, classes=len(cohort.head.classes), settings=settings, seed=seed,
            device=where,
        )  # fmt: skip
        lineage = lineage_of(
            cohort, network, settings=settings, options=options, mode=mode, seed=seed
        )
        identity = identity_of(lineage, cohort, encoder, network, ranks=ranks.world)
        own = cohort.shard(ranks.rank, ranks.world)
        with decoded([sources[i] for i in own], options=options, progress=shown) as stores:
            trainer = Trainer(
                network, cohort, dict(zip(own, stores, strict=True)), settings=settings, mode=mode,
                seed=seed, ranks=ranks, device=where,
            )  # fmt: skip
            path = None if checkpoint is None else Path(checkpoint)
            trainer.train(path, identity, shown)
        now = trainer.progress
        if now.best_epoch is not None and ranks.leads:
            warn_of_early_best(
                now.best_epoch, trained=now.epoch, epochs=settings.epochs, stacklevel=2
            )
        return make_result(trainer, encoder, lineage, options.transform)


def _parent(model: Encoder | str | os.PathLike[str] | None) -> Encoder:
    """The pretrained Encoder for `model`; loaded on the CPU where not given, as a copy trains."""
    if isinstance(model, Encoder):
        if model.dtype != torch.float32:
            warnings.warn(
                f"the encoder was loaded in {model.dtype}, so that its weights are rounded; load it"
                ' with dtype="float32" to start from those that were published',
                XmagWarning,
                stacklevel=3,
            )
        return model
    if not isinstance(model, str | os.PathLike | None):
        raise InputError(
            f"model is a {type(model).__name__}; expected an Encoder, or its name or path"
        )
    return load_model(DEFAULT_MODEL if model is None else model, device="cpu", dtype="float32")


def _network(
    encoder: Encoder,
    aggregator: str | nn.Module,
    *,
    classes: int,
    settings: Settings,
    seed: int,
    device: torch.device,
) -> Network:
    tiles = TileNetwork(encoder.vit, encoder.config, half=uses_half(settings.precision, device))
    freeze(tiles.vit, settings.frozen_blocks)
    with seeded(seed_of("weights", seed), torch.device("cpu")), Float32():
        head = make_aggregator(aggregator, in_dim=encoder.embed_dim, classes=classes)
    if head is aggregator:
        head = copy.deepcopy(head).float().requires_grad_(True)
    return Network(tiles, head)
