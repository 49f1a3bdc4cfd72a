"""Local files of a model, by path or fetched from the Hub; their content is not read here."""

import logging
import os
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from xmag.errors import HubError, InputError, WeightsError
from xmag.files import refuse_special
from xmag.hub.registry import MINI, MINI_WEIGHTS, find_known
from xmag.progress import tell
from xmag.urls import shown

_logger = logging.getLogger("xmag.hub")

_HUB_PREFIX = re.compile(r"hf[-_]hub:")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CANONICAL = ("model.safetensors", "pytorch_model.bin")
_SAFE, _PICKLED = (".safetensors",), (".bin", ".pth", ".pt", ".ckpt")
_CONFIG = "config.json"
_BESIDE = (_CONFIG, "preprocessor_config.json")
"""Files that describe a model; the second is of transformers."""
_OF_CLASSIFIER = "classifier.safetensors"
"""File that MILClassifier.save writes: never an encoder's weights, but it may lie beside them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModel:
    """The files of a model on this machine; `revision` is the commit of a Hub repository."""

    name: str
    weights: Path
    config_json: Path | None = None
    revision: str | None = None


def locate_model(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> LocalModel:
    """The local files of a model: "xmag-mini", an existing path, or a Hub name, fetched if need be.

    Raises InputError for what is none of these, HubError for what cannot be fetched, WeightsError
    for a folder or repository without weights that xmag reads.
    """
    if name == MINI:
        return LocalModel(name=MINI, weights=MINI_WEIGHTS)
    path = Path(name).expanduser()
    if path.exists():
        if revision is not None:
            raise InputError(
                f"revision={revision!r} was given for the local path {path}; it is for Hub names."
                " Leave it out"
            )
        refuse_special(path, WeightsError)
        if path.is_file():
            return LocalModel(name=str(path), weights=path)
        return _in_folder(path, name=str(path))
    if isinstance(name, str):
        name = _HUB_PREFIX.sub("", name, count=1)  # as timm writes Hub names
        known = find_known(name)
        name = name if known is None else known.repo
        if known is not None and known.unsupported is not None:
            raise InputError(
                f"{known.name} is known, and xmag cannot run it: {known.unsupported}. Give an"
                " object of your own with tile_spec, embed_dim, embed and provenance instead"
            )
    if not (isinstance(name, str) and _HUB_NAME.fullmatch(name)):
        raise InputError(
            f"{shown(name)!r} is no existing path and no Hub name; expected a checkpoint file,"
            f' a folder with weights, a name like "owner/model", or one of xmag.known_models()'
        )
    return _from_hub(name, revision, token, cache_dir, offline=local_files_only)


def _in_folder(folder: Path, *, name: str, revision: str | None = None) -> LocalModel:
    names = [entry.name for entry in folder.iterdir() if entry.is_file()]
    return LocalModel(
        name=name,
        weights=folder / _choose_weights(names, where=f"the folder {folder}"),
        config_json=folder / _CONFIG if _CONFIG in names else None,
        revision=revision,
    )


def _choose_weights(given: Iterable[str], *, where: str) -> str:
    """The file with the weights: the canonical name or the only one, safetensors before pickles."""
    names = sorted(name for name in given if "/" not in name)
    for suffixes in (_SAFE, _PICKLED):
        found = [name for name in names if name.endswith(suffixes) and name != _OF_CLASSIFIER]
        canonical = [name for name in found if name in _CANONICAL]
        if canonical or len(found) == 1:
            return (canonical or found)[0]
        if found:
            raise WeightsError(
                f"{where} has several files of weights, {found}; expected one, or one named"
                f" {' or '.join(_CANONICAL)}. Give the path of the file you mean (sharded weights"
                " have to be merged first)"
            )
    if _OF_CLASSIFIER in names:
        raise WeightsError(
            f"{where} has a classifier and no encoder; read it with MILClassifier.load, and load"
            " the encoder that its bags were made with"
        )
    ends = ", ".join(_SAFE + _PICKLED)
    raise WeightsError(f"{where} has no weights, only {names}; expected a file ending in {ends}")


def _from_hub(
    name: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    *,
    offline: bool,
) -> LocalModel:
    """The files of a repository: from the cache without a request where that is enough.

    Enough is any cached version for the default revision, and the very one for a commit; a branch
    or tag is looked up, as it may have moved.
    """
    # Only here is huggingface_hub needed, and it is slow to import.
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name}"
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    cached = None
    try:
        cached = _cached(name, revision, cache)
        if cached and (offline or revision is None or _COMMIT.fullmatch(revision)):
            return cached
        if offline:
            raise errors.OfflineModeIsEnabled("local_files_only=True")
        return _fetched(name, revision, token, cache, page)
    except errors.HFValidationError as error:
        raise InputError(f"{name!r} is no name that the Hub allows: {error}") from error
    except hub_failures() as error:
        # "Not in the cache" hides what kept it from being fetched.
        hidden = isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__
        reason = hidden or error
        status = status_of(reason)
        if cached and (status is None or status >= 500):
            _logger.warning("%s cannot be reached; using %s", page, cached.weights)
            return cached
        said = _explained(reason, status, page, revision) or (
            f"is not in the cache at {cache} and cannot be fetched from {page}"
            f" ({type(reason).__name__}: {reason}). Connect once, set HF_HOME or cache_dir= to a"
            " cache that has it, give a folder or file with its weights, or use"
            f' "{MINI}", which needs no network'
        )
        raise HubError(f"{name} {said}") from error


def _cached(name: str, revision: str | None, cache: Path) -> LocalModel | None:
    """The files of a revision in the cache; None where there are none, or not the weights."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # No pattern, as other files of the repository may well be missing.
        folder = snapshot_download(
            name, revision=revision, cache_dir=cache, local_files_only=True, allow_patterns=[]
        )
        return _in_folder(Path(folder), name=name, revision=Path(folder).name)
    except (LocalEntryNotFoundError, WeightsError):
        return None


def _fetched(
    name: str, revision: str | None, token: str | bool | None, cache: Path, page: str
) -> LocalModel:
    from huggingface_hub import HfApi, hf_hub_download

    lock_progress_bars()
    listing = HfApi(token=token).model_info(name, revision=revision).siblings or []
    names = [entry.rfilename for entry in listing]
    weights = _choose_weights(names, where=page)
    known = find_known(name)
    terms = known.terms if known else "not known to xmag; read its page"
    _logger.warning("fetching %s; terms of use: %s", page, terms)
    tell(None, f"fetching {page}; terms of use: {terms}")
    # The weights come last: a snapshot that has them is whole. The first file is asked for by the
    # name of the revision, which huggingface_hub then remembers; the next by its commit.
    folder = cache
    for file in (*(file for file in _BESIDE if file in names), weights):
        got = hf_hub_download(name, file, revision=revision, cache_dir=cache, token=token)
        folder = Path(got).parent
        revision = folder.name
    return _in_folder(folder, name=name, revision=revision)


def hub_failures() -> tuple[type[Exception], ...]:
    """Errors of a Hub that cannot be reached or refuses."""
    from huggingface_hub.errors import HfHubHTTPError

    # huggingface_hub speaks requests up to 0.x and httpx from 1.0: the errors of either are the
    # bases of its own, or OSError.
    return (OSError, *HfHubHTTPError.__bases__)


def status_of(error: BaseException) -> int | None:
    """The HTTP status in an error of the Hub; None where there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def lock_progress_bars() -> None:
    """Give the Hub's progress bars a lock of threads, as its later versions do by themselves.

    tqdm's own lock is shared with child processes, and making one fixes the start method of
    multiprocessing for the whole program.
    """
    from huggingface_hub.utils.tqdm import tqdm

    if "_lock" not in vars(tqdm):
        tqdm.set_lock(threading.RLock())


def _explained(
    error: BaseException, status: int | None, page: str, revision: str | None
) -> str | None:
    """End of the message for a model that the Hub does not give; None where it was silent."""
    from huggingface_hub import errors

    token = "set HF_TOKEN, run `hf auth login`, or pass token="
    terms = f"Accept its terms at {page} while logged in, then give a token of that account"
    match error:
        case errors.GatedRepoError():
            return f"is gated, and this account has no access. {terms}: {token}"
        case errors.RevisionNotFoundError():
            return (
                f"has no revision {revision!r}; expected a branch, tag or full commit hash listed"
                f" under its files at {page}"
            )
        case errors.RepositoryNotFoundError():
            return (
                f"was not found at {page}. Check the spelling; a private model needs a token that"
                f" may read it: {token}"
            )
    if status in (401, 403):
        return f"refused this account (HTTP {status}). {terms}: {token}"
    if status == 404:
        return (
            f"lists a file that it does not have at {page} ({error}). Try again, or another"
            " revision="
        )
    return None
