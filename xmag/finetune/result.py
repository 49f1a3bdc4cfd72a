"""Result of fine-tuning: the Encoder, the classifier of its embeddings, and their provenance."""

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch

from xmag.encoder import Encoder
from xmag.extract import Transform, fingerprint_of, name_of
from xmag.finetune.cohort import Cohort
from xmag.finetune.network import Network
from xmag.finetune.settings import Mode, Settings
from xmag.finetune.tilestore import TileOptions
from xmag.finetune.trainer import Epoch, Trainer
from xmag.mil import AGGREGATORS, MILClassifier, aggregator_config
from xmag.provenance import Provenance
from xmag.vit import ViT

_NEUTRAL = ("chunk_tiles", "checkpoint_steps")
"""Settings that do not change what is computed."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class FinetuneResult:
    """A fine-tuned encoder and the classifier that was trained with it.

    Attributes:
        encoder: In bfloat16 if it was trained so, else in float32. "lineage" in its provenance
            has the encoder that it started from, and the settings of the run.
        classifier: Takes the bags that `encoder` makes, and no others.
        history: Metrics of each epoch.
        best_epoch: The epoch whose weights were kept; None without validation: then the last.
        exact_encoder: The encoder in float32 on the CPU, which `save` writes.
    """

    encoder: Encoder
    classifier: MILClassifier
    history: tuple[Epoch, ...]
    best_epoch: int | None
    exact_encoder: Encoder

    def __repr__(self) -> str:
        best = "" if self.best_epoch is None else f", best {self.best_epoch}"
        return f"<FinetuneResult of {len(self.history)} epochs{best}: {self.encoder!r}>"

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Save to a folder that both ``load_model`` and ``MILClassifier.load`` read.

        It has model.safetensors and config.json, classifier.safetensors and classifier.json. Bags
        for the classifier are to be made in the precision that `encoder` has, which is what
        `load_model` takes by default on the kind of device that it was trained on. Raises
        OutputError where it cannot be written.
        """
        self.classifier.save(directory)
        self.exact_encoder.save(directory)


def make_result(
    trainer: Trainer, parent: Encoder, lineage: Mapping[str, Any], transform: Transform | None
) -> FinetuneResult:
    """The FinetuneResult of a run that is done; `lineage` is the origin of its weights."""
    progress, cohort, network = trainer.progress, trainer.cohort, cast(Network, trainer.result())
    best = None if progress.best_epoch is None else progress.best_epoch - 1  # from 0, as the rows
    lineage = {**lineage, "best_epoch": best, "epochs_trained": progress.epoch}
    exact = _exact_encoder(network.encoder.vit, parent, lineage)
    encoder = Encoder(
        copy.deepcopy(exact.vit),
        exact.config,
        provenance=exact.provenance,
        device=trainer.device,
        dtype="bfloat16" if network.encoder.half_precision else "float32",
    )
    counts = np.bincount(cohort.targets, minlength=len(cohort.head.classes))
    classifier = MILClassifier.from_module(
        network.aggregator,
        classes=cohort.head.classes,
        in_dim=encoder.embed_dim,
        class_prior=(counts / counts.sum()).tolist(),
        provenance=_provenance_of_bags(encoder, cohort, transform),
        device=trainer.device,
    )
    classifier.history_ = [asdict(row) for row in progress.history]
    classifier.best_epoch_ = best
    return FinetuneResult(
        encoder=encoder,
        classifier=classifier,
        history=tuple(progress.history),
        best_epoch=best,
        exact_encoder=exact,
    )


def lineage_of(
    cohort: Cohort,
    network: Network,
    *,
    settings: Settings,
    options: TileOptions,
    mode: Mode,
    seed: int,
) -> dict[str, Any]:
    """Description of a run as JSON values: settings, aggregator, tiles, split, seed."""
    head, transform = network.aggregator, options.transform
    named = type(head) in AGGREGATORS.values()
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
        "classes": len(cohort.head.classes),
        "train_slides": len(cohort.train),
        "validation_slides": len(cohort.validation),
        "random_state": seed,
    }


def identity_of(
    lineage: Mapping[str, Any], cohort: Cohort, encoder: Encoder, network: Network, *, ranks: int
) -> dict[str, Any]:
    """Identity of a run as JSON values, for its checkpoints: all that decides the weights."""
    slides = [source.identity for source in cohort.sources]
    head = network.aggregator.state_dict()
    return {
        **lineage,
        "settings": {k: v for k, v in lineage["settings"].items() if k not in _NEUTRAL},
        "encoder_sha256": encoder.provenance.get("weights_sha256"),
        "aggregator_sha256": hashlib.sha256(safetensors.torch.save(head)).hexdigest(),
        "slides_sha256": hashlib.sha256(json.dumps(slides).encode()).hexdigest(),
        "labels": [repr(cohort.head.classes[k]) for k in cohort.targets],
        "train": list(cohort.train),
        "processes": ranks,
    }


def _exact_encoder(vit: ViT, parent: Encoder, lineage: Mapping[str, Any]) -> Encoder:
    """Encoder with the trained weights, float32 on the CPU, and the SHA-256 of its file."""
    before = parent.provenance
    origin = {key: before.get(key) for key in ("name", "revision", "weights_sha256")}
    state = {key: t.detach().to("cpu", torch.float32) for key, t in vit.state_dict().items()}
    weights = safetensors.torch.save(state, metadata={"format": "pt"})
    provenance = {
        "name": f"{origin['name']}, fine-tuned",
        "revision": None,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "key_layout": "dinov2",
        "config": parent.config.to_dict(),
        "config_source": "given",
        "terms": before.get("terms"),
        "trained": True,
        "lineage": {**lineage, "from": origin},
    }
    return Encoder(copy.deepcopy(vit), parent.config, provenance=provenance)


def _provenance_of_bags(
    encoder: Encoder, cohort: Cohort, transform: Transform | None
) -> Provenance | None:
    """Provenance of the bags that the classifier takes; None for tiles without a plan."""
    options = [source.options for source in cohort.sources]
    if options[0] is None or any(other != options[0] for other in options):
        return None
    return Provenance(fingerprint_of(encoder, options[0], transform), {})
