"""Metadata of a run: the lineage of the fine-tuned encoder, and a checkpoint's identity."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import safetensors.torch

from xmag.encoder import Encoder
from xmag.extract import name_of
from xmag.finetune.cohort import Cohort
from xmag.finetune.settings import Mode, Settings
from xmag.finetune.tilestore import TileOptions
from xmag.finetune.training import Network
from xmag.mil import AGGREGATORS, aggregator_config
from xmag.training import Ranks

_NEUTRAL = ("chunk_tiles", "checkpoint_steps")
"""Settings that do not change what is computed."""


def describe(
    cohort: Cohort,
    network: Network,
    *,
    settings: Settings,
    options: TileOptions,
    mode: Mode,
    seed: int,
) -> dict[str, Any]:
    """Description of a run as JSON values: settings, aggregator, tiles, split, seed."""
    head = network.aggregator
    named = type(head) in AGGREGATORS.values()
    transform = options.transform
    return {
        "method": "finetune",
        "xmag": version("xmag"),
        "mode": mode,
        "settings": settings.to_dict(),
        "aggregator": aggregator_config(head) if named else {"name": type(head).__name__},
        "tiles": {
            "tissue": options.tissue,
            "min_tissue": options.min_tissue,
            "border": options.border,
            "mpp": options.mpp,
            "transform": None if transform is None else name_of(transform),
        },
        "classes": len(cohort.classes),
        "train_slides": len(cohort.train),
        "validation_slides": len(cohort.validation),
        "random_state": seed,
    }


def identify(
    about: Mapping[str, Any],
    cohort: Cohort,
    encoder: Encoder,
    network: Network,
    ranks: Ranks,
) -> dict[str, Any]:
    """Identity of a run as JSON values; it must be equal to resume from a checkpoint."""
    settings = {k: v for k, v in about["settings"].items() if k not in _NEUTRAL}
    slides = [source.identity for source in cohort.sources]
    head = network.aggregator.state_dict()
    return {
        **about,
        "settings": settings,
        "encoder_sha256": encoder.provenance.get("weights_sha256"),
        "aggregator_sha256": hashlib.sha256(safetensors.torch.save(head)).hexdigest(),
        "slides_sha256": hashlib.sha256(json.dumps(slides).encode()).hexdigest(),
        "labels": [repr(cohort.classes[k]) for k in cohort.targets],
        "train": list(cohort.train),
        "processes": ranks.world,
    }
