"""Local files of a model, by path or fetched from the Hub; their content is not read here."""

import logging
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xmag.errors import HubError, InputError, WeightsError
from xmag.files import refuse_special
from xmag.hub.registry import KNOWN, MINI
from xmag.urls import shown

if TYPE_CHECKING:
    from collections.abc import Iterable

_logger = logging.getLogger("xmag.hub")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CANONICAL = ("model.safetensors", "pytorch_model.bin")
_SAFE, _PICKLED = (".safetensors",), (".bin", ".pth", ".pt", ".ckpt")
_CONFIG = "config.json"
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
    """The local files of a model: an existing path, else a Hub repository, fetched if need be.

    Raises InputError for what is neither, HubError for what cannot be fetched, WeightsError for a
    folder or repository without weights that xmag reads.
    """
    path = Path(name).expanduser()
    if path.exists():
        if revision is not None:
            raise InputError(
                f"revision={revision!r} was given for the local path {path}; it is for Hub names."
                " Leave it out"
            )
        return _local_model(path)
    if not (isinstance(name, str) and _HUB_NAME.fullmatch(name)):
        raise InputError(
            f"{shown(name)!r} is no existing path and no Hub name; expected a checkpoint file,"
            f' a folder with weights, a name like "owner/model", or "{MINI}"'
        )
    return _HubModel(name, revision, token, cache_dir).get(local_files_only=local_files_only)


def _local_model(path: Path) -> LocalModel:
    refuse_special(path, WeightsError)
    if path.is_file():
        return LocalModel(name=str(path), weights=path)
    names = [entry.name for entry in path.iterdir() if entry.is_file()]
    weights = _choose_weights(names, where=f"the folder {path}")
    config = path / _CONFIG if _CONFIG in names else None
    return LocalModel(name=str(path), weights=path / weights, config_json=config)


def _choose_weights(names: "Iterable[str]", *, where: str) -> str:
    """The file with the weights: the canonical name or the only one, safetensors before pickles."""
    given = set(names)
    names = sorted(name for name in given if "/" not in name and name != _OF_CLASSIFIER)
    for suffixes in (_SAFE, _PICKLED):
        found = [name for name in names if name.endswith(suffixes)]
        canonical = [name for name in found if name in _CANONICAL]
        if canonical or len(found) == 1:
            return (canonical or found)[0]
        if found:
            raise WeightsError(
                f"{where} has several files of weights, {found}; expected one, or one named"
                f" {' or '.join(_CANONICAL)}. Give the path of the file you mean (sharded weights"
                " have to be merged first)"
            )
    if _OF_CLASSIFIER in given:
        raise WeightsError(
            f"{where} has a classifier and no encoder; read it with MILClassifier.load, and load"
            " the encoder that its bags were made with"
        )
    raise WeightsError(
        f"{where} has no weights, only {names}; expected a file ending in"
        f" {', '.join(_SAFE + _PICKLED)}"
    )


class _HubModel:
    """One repository of the Hub at one revision, and its place in the cache.

    The cache is huggingface_hub's own (HF_HOME, HF_HUB_CACHE, or cache_dir), whose layout is
    documented: huggingface.co/docs/huggingface_hub/guides/manage-cache.
    """

    def __init__(
        self,
        name: str,
        revision: str | None,
        token: str | bool | None,
        cache_dir: str | os.PathLike[str] | None,
    ) -> None:
        # Only here is huggingface_hub needed, and it is slow to import.
        from huggingface_hub import constants

        self._name = name
        self._revision = revision
        self._token = token
        self._endpoint = constants.ENDPOINT
        self._cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()

    def get(self, *, local_files_only: bool) -> LocalModel:
        """Local files: from the cache without a request where that is enough, else fetched.

        Enough is any cached version for the default revision, and the very one for a commit; a
        branch or tag is looked up, as it may have moved.
        """
        cached = self._cached()
        movable = self._revision is not None and not _COMMIT.fullmatch(self._revision)
        if cached and (local_files_only or not movable):
            return cached
        if local_files_only:
            raise self._unreachable("local_files_only=True")
        return self._fetch(cached)

    def _cached(self) -> LocalModel | None:
        folder = self._cache / f"models--{self._name.replace('/', '--')}"
        commit = self._revision or "main"
        ref = folder / "refs" / commit
        if ref.is_file():
            commit = ref.read_text().strip()
        snapshot = folder / "snapshots" / commit
        try:
            names = [entry.name for entry in snapshot.iterdir()]
            weights = snapshot / _choose_weights(names, where=str(snapshot))
        except (OSError, WeightsError):  # nothing there yet, or only a part
            return None
        config = snapshot / _CONFIG if _CONFIG in names else None
        return LocalModel(name=self._name, weights=weights, config_json=config, revision=commit)

    def _fetch(self, cached: LocalModel | None) -> LocalModel:
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        # huggingface_hub speaks requests up to 0.x and httpx from 1.0: the errors of either are
        # the bases of its own, or OSError.
        failures: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
        try:
            return self._download()
        except HFValidationError as error:
            raise InputError(f"{self._name!r} is no name that the Hub allows: {error}") from error
        except failures as error:
            # "Not in the cache" hides what kept it from being fetched.
            hidden = isinstance(error, LocalEntryNotFoundError) and error.__cause__
            reason = hidden or error
            status = getattr(getattr(reason, "response", None), "status_code", None)
            if cached and (status is None or status >= 500):
                _logger.warning("%s cannot be reached; using %s", self._page, cached.weights)
                return cached
            raise self._explained(reason, status) from error

    def _explained(self, error: BaseException, status: int | None) -> HubError:
        from huggingface_hub import errors

        if isinstance(error, errors.GatedRepoError):
            return self._forbidden("is gated, and this account has no access")
        if isinstance(error, errors.RevisionNotFoundError):
            return HubError(
                f"{self._page} has no revision {self._revision!r}; expected a branch, tag or full"
                " commit hash listed under its files"
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return HubError(
                f"{self._page} was not found. Check the spelling; a private model needs a token"
                " that may read it: set HF_TOKEN, run `hf auth login`, or pass token="
            )
        if status in (401, 403):
            return self._forbidden(f"refused this account (HTTP {status})")
        if status == 404:
            return HubError(
                f"{self._page} lists a file that it does not have ({error}). Try again, or another"
                " revision="
            )
        return self._unreachable(f"{type(error).__name__}: {error}")

    def _download(self) -> LocalModel:
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.utils.tqdm import tqdm

        # Later versions do this themselves: tqdm's own lock is shared with child processes, and
        # making one fixes the start method of multiprocessing for the whole program.
        if "_lock" not in vars(tqdm):
            tqdm.set_lock(threading.RLock())
        api = HfApi(endpoint=self._endpoint, token=self._token)
        listing = api.model_info(self._name, revision=self._revision).siblings or []
        names = [entry.rfilename for entry in listing]
        weights = _choose_weights(names, where=self._page)
        terms = (
            KNOWN[self._name].terms if self._name in KNOWN else "not known to xmag; read its page"
        )
        _logger.warning("fetching %s; terms of use: %s", self._page, terms)
        # The weights come last: a snapshot that has them is whole. The first file is asked for by
        # the name of the revision, which huggingface_hub then remembers; the next by its commit.
        commit, files = self._revision or "main", {}
        for name in ([_CONFIG] if _CONFIG in names else []) + [weights]:
            files[name] = Path(
                hf_hub_download(
                    self._name, name, revision=commit, cache_dir=self._cache, token=self._token
                )
            )
            commit = files[name].parent.name
        return LocalModel(
            name=self._name,
            weights=files[weights],
            config_json=files.get(_CONFIG),
            revision=commit,
        )

    @property
    def _page(self) -> str:
        return f"{self._endpoint}/{self._name}"

    def _forbidden(self, what: str) -> HubError:
        return HubError(
            f"{self._name} {what}. Accept its terms at {self._page} while logged in, then give a"
            " token of that account: set HF_TOKEN, run `hf auth login`, or pass token="
        )

    def _unreachable(self, reason: str) -> HubError:
        return HubError(
            f"{self._name} is not in the cache at {self._cache} and cannot be fetched from"
            f" {self._endpoint} ({reason}). Connect once, set HF_HOME or cache_dir= to a cache"
            f' that has it, give a folder or file with its weights, or use "{MINI}", which needs no'
            " network"
        )
