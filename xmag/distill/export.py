"""Export of a trained student to a folder for `load_model`, and to the Hugging Face Hub."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from xmag.distill.views import SIDE
from xmag.encoder import Encoder
from xmag.errors import HubError, InputError
from xmag.files import make_folder, write_text
from xmag.hub.fetch import hub_failures, lock_progress_bars, status_of
from xmag.hub.registry import SCHEMA, ModelConfig
from xmag.vit import ViT, empty_vit

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
MADE_BY = "distillation.json"
_POOLED = {
    "token": "the class token",
    "mean": "the mean of the patch tokens",
    "token+mean": "the class token and the mean of the patch tokens",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Author's part of a model card: name, terms and license.

    `name` is the name of the model in provenance, `terms` are those under which its weights may
    be used (the teacher's may bind them, and so may the slides'), and `license` is the identifier
    that the Hub shows.
    """

    name: str = "xmag-distilled"
    terms: str = "not stated"
    license: str = "other"


def export_student(
    directory: str | os.PathLike[str],
    vit: ViT,
    config: ModelConfig,
    *,
    made_by: Mapping[str, Any],
    card: Card | None = None,
) -> Encoder:
    """Write the student to a folder; returns it as an Encoder, float32 on the CPU.

    The folder gets model.safetensors and config.json (with the tile specification), which
    `load_model` reads, README.md, its card, and distillation.json, with `made_by` as JSON. Raises
    OutputError where they cannot be written.
    """
    folder, card = Path(directory), card or Card()
    make_folder(folder)
    ours = empty_vit(config.vit)
    state = {name: t.detach().to("cpu", copy=True) for name, t in vit.state_dict().items()}
    ours.load_state_dict(state, assign=True)
    about = {"name": card.name, "terms": card.terms, "trained": True}
    encoder = Encoder(ours, config, provenance=about)
    record = {"xmag": version("xmag"), "torch": version("torch"), **made_by}
    write_text(folder / MADE_BY, json.dumps(record, indent=2) + "\n")
    write_text(folder / CARD, model_card(config, record, card))
    encoder.save(folder)
    return encoder


def model_card(config: ModelConfig, made_by: Mapping[str, Any], card: Card) -> str:
    """Model card in Markdown, with the YAML header that the Hub reads."""
    spec, vit, data = config.tile_spec, config.vit, made_by["data"]
    train, results = made_by["settings"]["train"], made_by["results"]
    teachers = "\n".join(
        f"- {t.get('name')}, weight {t['weight']:g}, weights SHA-256 {t.get('weights_sha256')}"
        for t in made_by["teachers"]
    )
    per_site = ", ".join(f"{site} {n:,}" for site, n in data.get("regions_per_site", {}).items())
    slides = f" from {data['slides']:,} slides" if "slides" in data else ""
    sites = f" ({per_site})" if per_site else ""
    region = f"{SIDE * spec.size_px} px at {spec.mpp / SIDE:g} µm/px"
    damaged = results["damaged_regions"]
    text = f"""---
library_name: xmag
license: {card.license}
tags: [pathology, histology, feature-extraction, distillation]
---
# {card.name}

A vision transformer for pathology at {spec.mpp:g} µm/px, distilled with xmag {made_by["xmag"]}
across magnifications (arXiv 2509.23097). For research; not a medical device, not for the clinic.

```python
import xmag

encoder = xmag.load_model("path/or/repository")
```

| | |
|---|---|
| tiles | {spec.size_px} px at {spec.mpp:g} µm/px, resampled by `{spec.resample}` |
| embedding | {vit.embed_dim}-d, {_POOLED[vit.pooling]} after the final norm |
| ViT | width {vit.width}, depth {vit.depth}, heads {vit.heads}, patch {vit.patch_px} px |
| began from | {made_by["student"].get("name") or "random weights"} |
| terms | {card.terms} |

## Teachers

{teachers}

The terms of a teacher may bind what is learned from it: read them.

## Data

{data["training_regions"]:,} regions of {region}{slides}{sites}.
{data["validation_regions"]:,} more were held out. {damaged:,} were damaged and left out.

## Training

{results["steps"]:,} steps of {train["batch"]} regions, {train["views"]} views each. What is here is
the running average of the weights (decay {train["ema"]:g}). `{MADE_BY}` has every setting.
"""
    if not results["validation"]:
        return text
    rows = "\n".join(
        f"| {name} | {results['untrained'][name]:.3f} | {value:.3f} |"
        for name, value in results["validation"].items()
    )
    return f"""{text}
Cosine to the teachers on the regions held out; "centred" takes off what all regions share:

| | untrained | trained |
|---|---|---|
{rows}
"""


def push_to_hub(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = True,
    token: str | bool | None = None,
    revision: str | None = None,
    message: str = "Upload a model distilled with xmag",
) -> str:
    """Upload an exported model to the Hub, in a new or existing repository; the commit's URL.

    Uploaded are model.safetensors, config.json, README.md and distillation.json, and nothing else
    that lies there. The account is that of `token`, by default HF_TOKEN or what `hf auth login`
    stored. Read the terms of the teacher before you publish what was learned from it.

    Raises InputError where `directory` is no exported model or `repo_id` no name for one, HubError
    where the Hub cannot be reached or refuses.
    """
    folder = Path(directory)
    _check_exported(folder)
    # Slow to import, and needed only here.
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError

    lock_progress_bars()
    api = HfApi(endpoint=constants.ENDPOINT, token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[WEIGHTS, CONFIG, CARD, MADE_BY],
            commit_message=message,
            revision=revision,
        )
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is no name that the Hub allows: {error}") from error
    except hub_failures() as error:
        if (status := status_of(error)) in (401, 403):
            raise HubError(
                f"{api.endpoint} refused to let this account write {repo_id} (HTTP {status}). Give"
                " a token that may write: set HF_TOKEN, run `hf auth login`, or pass token="
            ) from error
        raise HubError(
            f"{folder} cannot be uploaded to {api.endpoint}/{repo_id}"
            f" ({type(error).__name__}: {error}). Nothing was committed; try again"
        ) from error
    return str(commit.commit_url)


def _check_exported(folder: Path) -> None:
    missing = [name for name in (WEIGHTS, CONFIG, CARD) if not (folder / name).is_file()]
    if not missing:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        missing = [] if config.get("format") == SCHEMA else [f"{CONFIG} of format {SCHEMA!r}"]
    if missing:
        raise InputError(
            f"{folder} lacks {', '.join(missing)}; expected the model/ folder of a run, or what"
            " export_student wrote"
        )
