"""Models by name, for workers on other machines to load the very same weights."""

import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from xmag.encoder import Encoder, TileEncoder, load_model
from xmag.errors import HubError, InputError, ModelError, WeightsError, XmagError
from xmag.hub.fetch import locate_model
from xmag.hub.registry import DEFAULT_MODEL, MINI, MINI_SHA256, ModelConfig
from xmag.hub.weights import file_sha256

_lock = threading.Lock()
_loaded: dict[tuple["ModelName", str], Encoder] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelName:
    """Name of a model for `load_model` on another machine, with the hash of its weights.

    `path_or_name` is an absolute path or a Hub name, `recorded` the name that the provenance has.
    `dtype` is None where each machine chooses its own.
    """

    path_or_name: str
    recorded: str
    revision: str | None
    weights_sha256: str
    config_json: str
    is_config_given: bool
    dtype: str | None

    def load(self, device: str) -> Encoder:
        """The Encoder, loaded once a process.

        Raises WeightsError where this machine has other weights under that name.
        """
        key = (self, device)
        with _lock:
            if key not in _loaded:
                _loaded.clear()  # the memory of a GPU is there for one
                _loaded[key] = self._load(device)
            return _loaded[key]

    def _load(self, device: str) -> Encoder:
        config = ModelConfig.from_dict(json.loads(self.config_json))
        encoder = load_model(
            self.path_or_name,
            revision=self.revision,
            config=config if self.is_config_given else None,
            device=device,
            dtype=self.dtype or "auto",
        )
        found = encoder.provenance["weights_sha256"]
        if found != self.weights_sha256 or encoder.config != config:
            what = "weights" if found != self.weights_sha256 else "config"
            raise WeightsError(
                f"{self.recorded!r} has another {what} on this machine (weights sha256"
                f" {found[:12]}) than where the cohort was started"
                f" ({self.weights_sha256[:12]}); copy the model here again, or name one by its Hub"
                " revision"
            )
        return encoder.named(self.recorded)


def by_name(model: TileEncoder | str | os.PathLike[str] | None) -> tuple[ModelName, Encoder]:
    """The name under which other machines load `model`, and the model itself.

    Given by name it is loaded on the CPU, to see that it is whole. Raises ModelError for one that
    no machine can load by name: weights do not travel.
    """
    if model is None or isinstance(model, str | os.PathLike):
        encoder = load_model(DEFAULT_MODEL if model is None else model, device="cpu")
        return _name_of(encoder, dtype=None), encoder
    if not isinstance(model, TileEncoder):
        raise InputError(
            f"model is a {type(model).__name__}; expected a name, a path, or an Encoder that"
            " load_model made"
        )
    if not isinstance(model, Encoder):
        raise ModelError(
            f"model is a {type(model).__name__}, which workers cannot load: models travel by name."
            " Give an Encoder that load_model made, or a name, or leave executor= out"
        )
    return _name_of(model, dtype=str(model.dtype).removeprefix("torch.")), model


def _name_of(encoder: Encoder, *, dtype: str | None) -> ModelName:
    about = encoder.provenance
    recorded, sha256 = str(about.get("name")), about.get("weights_sha256")
    revision = about.get("revision")
    path = Path(recorded).expanduser()
    is_path = recorded != MINI and path.exists()
    if not _is_loadable(recorded, revision, str(sha256), is_path=is_path):
        raise ModelError(
            f"the encoder {recorded!r} cannot be loaded by its name with the same weights, and"
            " weights do not travel to workers: encoder.save(folder) writes them to a folder that"
            " the workers see; then give model=folder"
        )
    return ModelName(
        path_or_name=str(path.absolute()) if is_path else recorded,
        recorded=recorded,
        revision=revision,
        weights_sha256=str(sha256),
        config_json=json.dumps(encoder.config.to_dict(), sort_keys=True),
        is_config_given=about.get("config_source") == "given",
        dtype=dtype,
    )


def _is_loadable(name: str, revision: str | None, sha256: str, *, is_path: bool) -> bool:
    """Whether `load_model` would give these weights, as far as that can be seen from here."""
    if name == MINI:
        return sha256 == MINI_SHA256
    if not is_path and revision is None:
        return False
    try:
        files = locate_model(name, revision=revision, local_files_only=True)
        return file_sha256(files.weights) == sha256
    except HubError:
        return True  # not cached under this revision here: each worker compares the hash
    except XmagError:
        return False
