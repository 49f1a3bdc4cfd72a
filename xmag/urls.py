"""Places of files: paths of this machine, and URLs of the stores that fsspec knows.

A URL may carry a password or a signature. What is shown of one, in messages, reports, logs and
provenance, has neither: ``str(url)`` leaves them out, and errors of the libraries below, which
name whole URLs, are told anew.
"""

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from xmag.errors import InputError, MissingExtraError, OutputError, XmagError

_SCHEME = re.compile(r"((?:[A-Za-z][A-Za-z0-9+.-]+::)*[A-Za-z][A-Za-z0-9+.-]+)://")
_CHAINED = re.compile(r"::(?=[A-Za-z][A-Za-z0-9+.-]+:|/)")
"""Between the URLs of a chain, "zip://a.svs::https://host/slides.zip", and not in "http://[::1]"."""
_REST = re.compile(rf"\?|{_CHAINED.pattern}")
_MANGLED = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):[/\\](?![/\\])")

_SURROGATE = re.compile("[\udc80-\udcff]")

_HTTP = ("http", "https")
_WHOLE_PUTS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "memory"}
"""Stores where an object appears under its name when all of it is there, and never before."""

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}


@dataclass(frozen=True, slots=True, repr=False)
class Url:
    """The URL of a file or folder in a store. Has the few parts of a Path that xmag uses.

    In one of fsspec's chains, such as "zip://a.svs::https://host/slides.zip", the file is what the
    first URL names.
    """

    text: str
    """The whole URL, with the credentials and signatures that must not be shown."""

    def __str__(self) -> str:
        protocol, path, rest = self._split()
        return "::".join(map(_shown, [protocol + path, *_CHAINED.split(rest)[1:]]))

    def __repr__(self) -> str:
        return f"Url({str(self)!r})"

    @property
    def scheme(self) -> str:
        """The (first) protocol in lower case, such as "s3"."""
        return self.text.partition(":")[0].lower()

    @property
    def parts(self) -> tuple[str, ...]:
        """The host or bucket without credentials, then the segments of the path, decoded."""
        return _parts("".join(self._split()[:2]))

    @property
    def name(self) -> str:
        """The last segment that is not empty."""
        return next((part for part in reversed(self.parts) if part), "")

    @property
    def suffix(self) -> str:
        """Suffix of the name, from its last dot."""
        return PurePath(self.name).suffix

    @property
    def parent(self) -> "Url":
        """The folder it lies in."""
        protocol, path, rest = self._split()
        return Url(protocol + path.rstrip("/").rpartition("/")[0] + rest)

    def __truediv__(self, below: object) -> "Url":
        protocol, path, rest = self._split()
        folder = f"{path.rstrip('/')}/" if path else ""
        return Url(f"{protocol}{folder}{below}{rest}")

    def with_name(self, name: str) -> "Url":
        """Another file beside it."""
        return self.parent / name

    def exists(self) -> bool:
        """Whether something lies there. Raises OutputError where the store does not say."""
        with retold(OutputError, self):
            store, path = self.store()
            return bool(store.exists(path))

    def mkdir(self, *, parents: bool, exist_ok: bool) -> None:
        """Do nothing: stores have no folders, or make them as they are written to."""

    def store(self) -> tuple[Any, str]:
        """Filesystem of fsspec, and its name for the path.

        Raises MissingExtraError where a package is missing, InputError for an unknown protocol.
        """
        extra = _EXTRAS.get(self.scheme, "remote")
        try:
            from fsspec.core import url_to_fs

            # Other machines write there too: what was listed once may be out of date.
            store, path = url_to_fs(self.text, use_listings_cache=False)
        except ImportError as error:
            raise MissingExtraError(
                f"{self} needs packages that are not installed ({error}); run"
                f' pip install "xmag[{extra}]"'
            ) from None
        except ValueError as error:
            if "rotocol" not in str(error):
                raise
            raise InputError(
                f"{self} has the protocol {self.scheme!r}, which fsspec does not know; expected"
                " https://, s3://, gs:// or another of its"
            ) from None
        return store, str(path)

    def info(self) -> dict[str, Any]:
        """Facts of the store about the file, its "size" at least. Raises what the store does."""
        store, path = self.store()
        facts: dict[str, Any] = store.info(path)
        if facts.get("type") == "directory":
            raise IsADirectoryError
        return facts

    def read(self) -> bytes:
        """All of its bytes. Raises what the store does; see `told`."""
        store, path = self.store()
        return bytes(store.cat_file(path))

    def write(self, data: bytes) -> None:
        """Put `data` there, so that no other reader sees a part of it, and read it back.

        For `xmag.files` alone. Raises what the store does, and OSError where it reads back
        otherwise.
        """
        if self.scheme in _HTTP:
            raise InputError(
                f"{self} cannot be written to: HTTP servers only give files. Write to a folder, or"
                " to a store such as s3:// or gs://"
            )
        store, path = self.store()
        if self.scheme in _WHOLE_PUTS:
            store.pipe_file(path, data)
        else:
            folder = path.rpartition("/")[0]
            store.makedirs(folder, exist_ok=True)
            temp = f"{folder}/.{os.getpid()}-{os.urandom(8).hex()}.xmag-tmp"
            store.pipe_file(temp, data)
            store.mv(temp, path)
        if store.cat_file(path) != data:
            store.rm_file(path)
            raise OSError("what was written reads back differently")

    def remove(self) -> None:
        """Remove the file, if it is there."""
        store, path = self.store()
        if store.exists(path):
            store.rm_file(path)

    def files_below(self) -> list["Url"]:
        """Every file below it, in order. Raises what the store does; see `told`."""
        store, path = self.store()
        start = len(path.rstrip("/")) + 1
        return [self / found[start:] for found in sorted(store.find(path))]

    def _split(self) -> tuple[str, str, str]:
        """The protocol with its "://", the file's own path, and the rest: a query, or more URLs."""
        start = self.text.index("://") + 3
        rest = _REST.search(self.text, start)
        end = rest.start() if rest else len(self.text)
        return self.text[:start], self.text[start:end], self.text[end:]


Place = Path | Url
"""Place of a file: a path or a URL."""


def place_of(path: str | os.PathLike[str] | Url) -> Place:
    """The place that a path or a URL names; "file://" is a path like any other.

    Raises InputError for a URL that went through pathlib, which makes another one of it.
    """
    if isinstance(path, Url):
        return path
    text = os.fspath(path)
    scheme = _SCHEME.match(text)
    if scheme is None:
        if (mangled := _MANGLED.match(text)) and not Path(text).exists():
            raise InputError(
                f"{mangled[0]}... looks like a URL that lost a slash, as pathlib.Path makes of"
                " them; give URLs as str"
            )
        return Path(text)
    is_path = scheme[1].lower() == "file"
    return Path(url2pathname(urlsplit(text).path)) if is_path else Url(text)


def shown(path: str | os.PathLike[str] | Url) -> str:
    """A path or URL as a message may repeat it: without credentials, and as `readable`."""
    return readable(str(place_of(path)))


def without_folder(text: str, path: Path) -> str:
    """Text in which what lies beside a file is named without the folders above it.

    Messages of libraries name whole paths, which say more of a machine and its user than belongs
    into a report.
    """
    folders = {path.parent, path.parent.absolute(), Path(os.path.realpath(path.parent))}
    for folder in sorted(folders, key=lambda folder: len(str(folder)), reverse=True):
        name = str(folder)
        if name.strip(".") and name != os.sep:
            # As a whole: a folder called "m" is not in "µm/px", and "/d" not in "/data".
            begin = "" if folder.is_absolute() else r"(?<!\w)"
            whole = rf"{begin}{re.escape(name)}(?:({re.escape(os.sep)})|(?!\w))"
            text = re.sub(whole, lambda found: "" if found[1] else path.parent.name, text)
    return text


def readable(text: str) -> str:
    """Text in which bytes of a file name that are not UTF-8 stand as "%E9", and not as surrogates.

    Python keeps such bytes as lone surrogates (PEP 383), which no file, store or stream takes.
    """
    return _SURROGATE.sub(lambda found: f"%{ord(found[0]) & 0xFF:02X}", text)


@contextmanager
def retold(kind: type[XmagError], place: object) -> Iterator[None]:
    """A context whose errors, but for xmag's own, become `kind` with the words of `told`."""
    try:
        yield
    except XmagError:
        raise
    # fsspec's stores raise what their libraries do: there is no common base.
    except Exception as error:  # noqa: BLE001
        raise kind(told(error, place)) from None


def told(error: BaseException, place: object) -> str:
    """Message for an error at a URL, with its remedy, without a word of the library's own.

    That may name the whole URL, with its signature.
    """
    status = getattr(error, "status", None)
    kinds = [kind.__name__ for kind in type(error).__mro__]
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        words = "does not exist; check the URL"
    elif isinstance(error, IsADirectoryError):
        words = "is a folder; expected a file"
    elif isinstance(error, PermissionError) or status in (401, 403):
        words = (
            f"refuses access{f' (HTTP {status})' if status else ''}; check the credentials for that"
            " store, or whether the link has expired"
        )
    elif isinstance(error, TimeoutError):
        words = "gave no answer in time; check the network, then try again"
    elif isinstance(status, int):
        words = f"answers HTTP {status}; try again later, or ask whoever runs that server"
    elif "NoCredentialsError" in kinds:
        words = "needs credentials, and none are set up; configure them for that store"
    else:
        words = f"cannot be reached or used ({kinds[0]}); check the network, then try again"
    return f"{place} {words}"


def common_parts(urls: Sequence[Url]) -> int:
    """Number of leading parts that all the folders of `urls` share."""
    levels = zip(*(url.parts[:-1] for url in urls), strict=False)
    return len(list(itertools.takewhile(lambda level: len(set(level)) == 1, levels)))


def _parts(bare: str) -> tuple[str, ...]:
    """Host or bucket, and segments, of a URL without its query; see `Url.parts`."""
    protocol, _, path = bare.partition("://")
    if protocol.rpartition("::")[2].lower() not in _HTTP:
        host, *segments = path.split("/")
    else:
        host, *quoted = path.partition("#")[0].split("/")
        segments = [_decoded(segment) for segment in quoted]
    return (host.rpartition("@")[2], *segments)


def _shown(link: str) -> str:
    """One URL of a chain without credentials and query."""
    bare = link.partition("?")[0]
    protocol, found, _ = bare.partition("://")
    return f"{protocol.lower()}://{'/'.join(_parts(bare))}" if found else bare


def _decoded(segment: str) -> str:
    """A segment without percent escapes, unless it would then be more than a name."""
    name = unquote(segment)
    return segment if {"/", "\\", "\0"} & set(name) or name in (".", "..") else name


def base_name(model: object) -> str:
    """The name of a model without the folders of a path, which are nobody else's business."""
    text = str(model)
    return PurePath(text).name if PurePath(text).is_absolute() else text
