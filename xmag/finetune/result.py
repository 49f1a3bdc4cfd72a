"""What fine-tuning gives: an Encoder, a classifier on its embeddings, and how they came about."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from xmag.encoder import Encoder
from xmag.errors import OutputError
from xmag.files import write_text
from xmag.finetune.training import Epoch
from xmag.mil import MILClassifier
from xmag.vit import ViT


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneResult:
    """A fine-tuned encoder and the classifier that was trained with it.

    Attributes:
        encoder: In float32; its provenance has under "lineage" what it was made from, and how.
        classifier: Takes bags that `encoder` made.
        history: A row for each epoch.
        best_epoch: The one that the weights are of; None without validation: then the last.
    """

    encoder: Encoder
    classifier: MILClassifier
    history: tuple[Epoch, ...]
    best_epoch: int | None

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write a folder that both ``load_model`` and ``MILClassifier.load`` read.

        It has model.safetensors and config.json, classifier.safetensors and classifier.json, and
        finetune.json with the history. Raises OutputError where it cannot be written.
        """
        folder = Path(directory)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"the folder {folder} cannot be made: {error.strerror}; name another one"
            ) from error
        self.classifier.save(folder)
        self.encoder.save(folder)
        about = {
            "best_epoch": self.best_epoch,
            "history": [asdict(row) for row in self.history],
            "lineage": self.encoder.provenance["lineage"],
        }
        write_text(folder / "finetune.json", json.dumps(about, indent=1) + "\n")


def finetuned_encoder(
    vit: ViT, parent: Encoder, *, lineage: Mapping[str, Any], device: torch.device
) -> Encoder:
    """The Encoder of trained weights, in float32.

    It has the parent's terms; `lineage` says how it was made, and gets what it was made from. Its
    weights_sha256 is that of the file that `Encoder.save` will write.
    """
    before = parent.provenance
    origin = {key: before.get(key) for key in ("name", "revision", "weights_sha256")}
    provenance = {
        "name": f"{origin['name']}, fine-tuned",
        "revision": None,
        "weights_sha256": _sha256_as_saved(vit),
        "key_layout": "dinov2",
        "config": parent.config.to_dict(),
        "config_source": "given",
        "terms": before.get("terms"),
        "trained": True,
        "lineage": {**lineage, "from": origin},
    }
    return Encoder(vit, parent.config, provenance=provenance, device=device, dtype="float32")


def finetuned_classifier(aggregator: nn.Module, classes: Sequence[Any]) -> MILClassifier:
    """The fitted classifier around a trained aggregator."""
    return MILClassifier.from_module(aggregator.eval(), classes=classes)


def _sha256_as_saved(vit: ViT) -> str:
    state = {key: t.detach().to("cpu", torch.float32) for key, t in vit.state_dict().items()}
    return hashlib.sha256(safetensors.torch.save(state, metadata={"format": "pt"})).hexdigest()
