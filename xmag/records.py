"""Records: frozen dataclasses to JSON values and back, checked, and the formats of their files.

What is read is compared with the types of the fields. An error names the key, what was seen and
what was expected, and for an unknown key the nearest known one.
"""

import functools
import json
import os
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, TypeVar, Union

from xmag.errors import InputError, XmagError

_Record = TypeVar("_Record")
_Values = dict[str, Any]

_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}

_hints: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)


class Record:
    """Base of dataclasses that become JSON values and come back."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dict(plain(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """One with these fields; InputError for one unknown, missing or of another type."""
        return from_dict(cls, values, cls.__name__)


def plain(value: Any) -> Any:
    """A dataclass as a dict of its fields, and so on down: dicts and lists, as JSON has them."""
    if is_dataclass(value):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def from_dict(
    kind: type[_Record], values: Any, where: str = "", *, to_float: bool = False
) -> _Record:
    """The dataclass `kind` with these JSON values; `where` is their place, for errors.

    With `to_float` whole numbers become floats where a field is one, as people write them. Raises
    InputError for an unknown key, a missing one, and a value of another type. A key in `REMOVED` of
    the class is unknown for the reason that stands there.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where or 'all of it'} is {reprlib.repr(values)}; expected a table")
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            close = nearest(key, known)
            remedy = f"did you mean {close!r}?" if close else f"expected one of {sorted(known)}"
            remedy = getattr(kind, "REMOVED", {}).get(key, remedy)
            raise InputError(f"{_at(where, key)} is no known key; {remedy}")
    for name, item in known.items():
        if name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise InputError(f"{_at(where, name)} is missing; expected a value for it")
    hints = _hints(kind)
    return kind(**{k: _converted(v, hints[k], _at(where, k), to_float) for k, v in values.items()})


def require(record: Any, name: str, fits: bool, expected: str, where: str = "") -> None:
    """Raise InputError where a field does not hold what it should, by its name and what it holds.

    `where` is the place of the record, by default the name of its class.
    """
    if not fits:
        place = f"{where or type(record).__name__}.{name}"
        raise InputError(f"{place} is {getattr(record, name)!r}; expected {expected}")


def nearest(name: Any, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known name that is most like another, by difflib's ratio; None where none is alike."""
    import difflib  # only here: it takes longer to import than all else here

    return next(iter(difflib.get_close_matches(str(name), list(known), 1, cutoff)), None)


def loads(text: str) -> Any:
    """The values in a JSON text; ValueError for others, NaN and what is nested too deep too."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested deeper than anything that xmag writes") from None


def read_toml(kind: type[_Record], path: str | os.PathLike[str]) -> _Record:
    """The dataclass `kind` in a TOML file; InputError for a file that holds none."""
    import tomllib  # only here, as difflib

    text = _text_of(path, InputError)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{os.fspath(path)!r} is no TOML: {error}") from error
    return from_dict(kind, values, to_float=True)


def newer(name: str, version: int, known: int) -> str:
    """The message for a file of a newer schema_version than the `known` one."""
    return (
        f"{name} has schema_version {version}, and this xmag reads up to {known}; upgrade it:"
        " pip install --upgrade xmag"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A format of JSON files: "format" (if it has a `name`), "schema_version", and the rest.

    `writer` is what writes such files, and `remedy` what to do about one that is something else, or
    older than the `migrations`, which make the values of the next version from those of the version
    that is their key. What is wrong is an `error`.
    """

    name: str | None = None
    version: int
    writer: str
    remedy: str
    error: type[XmagError] = InputError
    migrations: Mapping[int, Callable[[_Values], _Values]] = field(default_factory=dict)

    def headed(self, values: Mapping[str, Any]) -> _Values:
        """The values with what says which format they have."""
        name: _Values = {} if self.name is None else {"format": self.name}
        return {**name, "schema_version": self.version, **values}

    def dumps(self, values: Mapping[str, Any], **layout: Any) -> str:
        """The text of a file with these values, with a layout as `json.dumps` takes it."""
        return json.dumps(self.headed(values), allow_nan=False, **layout)

    def loads(self, text: str, name: str = "this") -> _Values:
        """The values in the text of a file called `name`, of this version."""
        try:
            values = loads(text)
        except ValueError as error:
            raise self._refused(name, f"it is not JSON: {error}") from error
        return self.opened(values, name)

    def load(self, path: str | os.PathLike[str]) -> _Values:
        """The values in a file, of this version."""
        return self.loads(_text_of(path, self.error), repr(os.fspath(path)))

    def opened(self, values: Any, name: str = "this") -> _Values:
        """The values that went into `headed`, brought to this version."""
        if not isinstance(values, dict):
            raise self._refused(name, f"it holds a {type(values).__name__}")
        found: _Values = dict(values)
        if self.name is not None and (kind := found.pop("format", None)) != self.name:
            raise self._refused(name, f"it has format {kind!r}, not {self.name!r}")
        version = found.pop("schema_version", None)
        if type(version) is not int or version < 1:
            raise self._refused(name, f"it has schema_version {version!r}")
        if version > self.version:
            raise self.error(newer(name, version, self.version))
        while version < self.version:
            if version not in self.migrations:
                raise self.error(
                    f"{name} has schema_version {version}, which this xmag no longer reads;"
                    f" {self.remedy}"
                )
            found, version = self.migrations[version](found), version + 1
        return found

    @contextmanager
    def reading(self, name: str = "this") -> Iterator[None]:
        """A context in which values that do not fit are an error that says so."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            reason = str(error) if isinstance(error, InputError) else repr(error)
            raise self._refused(name, reason) from error

    def _refused(self, name: str, reason: str) -> XmagError:
        return self.error(f"{name} is not what {self.writer} wrote ({reason}); {self.remedy}")


def _text_of(path: str | os.PathLike[str], kind: type[XmagError]) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise kind(f"{os.fspath(path)!r} cannot be read ({error}); check the path") from error


def _converted(value: Any, hint: Any, where: str, to_float: bool) -> Any:
    """A value as the type of a field has it; InputError where it is of another."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        for choice in inner:
            if _fits(value, choice):
                return _converted(value, choice, where, to_float)
    elif _fits(value, hint):
        if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
            return from_dict(hint, value, where, to_float=to_float)
        if origin in (list, tuple):
            hints = inner[:1] * len(value) if origin is list or inner[-1] is ... else inner
            if len(hints) == len(value):
                items = enumerate(zip(value, hints, strict=True))
                return origin(_converted(v, h, f"{where}[{n}]", to_float) for n, (v, h) in items)
        else:
            return float(value) if hint is float and to_float else value
    raise InputError(f"{where} is {reprlib.repr(value)}; expected {_described(hint)}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value may be of a type, by its outermost part."""
    origin = typing.get_origin(hint)
    if hint is Any or origin is Literal:
        return hint is Any or value in typing.get_args(hint)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    if origin in (list, tuple):
        return isinstance(value, list | tuple)
    kind = origin or hint
    return isinstance(value, kind) or (is_dataclass(kind) and isinstance(value, Mapping))


def _described(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if origin in (Union, types.UnionType):
        return " or ".join(_described(part) for part in inner if part is not type(None))
    if origin is tuple and inner[-1] is not ...:
        return f"a list of {len(inner)}"
    if origin in (list, tuple):
        of = "tables" if is_dataclass(inner[0]) else f"{_described(inner[0])[2:]}s"
        return f"a list of {of}"
    return "a table" if is_dataclass(hint) else _NAMES.get(origin or hint, "a table")


def _at(where: str, key: str) -> str:
    return f"{where}.{key}" if where else str(key)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
