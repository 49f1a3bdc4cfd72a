"""Records: dataclasses to JSON values and back, and what is said of values that do not fit."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from xmag import records
from xmag.errors import InputError, OutputError


@dataclass(frozen=True, kw_only=True)
class Part(records.Record):
    """A record in another."""

    size: tuple[int, int]
    share: float | None = None


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A record with each kind of field."""

    name: str
    mode: Literal["fast", "exact"] = "fast"
    count: int = 1
    rate: float = 0.5
    on: bool = True
    parts: tuple[Part, ...] = ()
    names: list[str] = field(default_factory=list)
    place: str | list[str] = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise InputError(f"rate is {self.rate}; expected a positive number")


WHOLE = Whole(
    name="a", parts=(Part(size=(1, 2)), Part(size=(3, 4), share=0.5)), options={"deep": {"x": [1]}}
)
FORMAT = records.Format(
    name="xmag.Whole",
    version=3,
    writer="Whole.save",
    remedy="make it again",
    error=OutputError,
    migrations={2: lambda values: {**values, "count": values["number"] * 2}},
)


def test_records_survive_json() -> None:
    values = records.plain(WHOLE)
    assert values["parts"] == [{"size": [1, 2], "share": None}, {"size": [3, 4], "share": 0.5}]
    assert records.from_dict(Whole, json.loads(json.dumps(values))) == WHOLE
    assert records.from_dict(Whole, {"name": "a"}) == Whole(name="a")


def test_a_record_has_its_values_and_comes_back_from_them() -> None:
    part = Part(size=(1, 2), share=0.5)
    assert part.to_dict() == {"size": [1, 2], "share": 0.5}
    assert Part.from_dict(part.to_dict()) == part
    with pytest.raises(InputError, match=r"^Part\.siez is no known key; did you mean 'size'\?"):
        Part.from_dict({"siez": [1, 2]})
    records.require(part, "share", True, "a part")
    with pytest.raises(InputError, match=r"^Part\.share is 0\.5; expected a part$"):
        records.require(part, "share", False, "a part")
    with pytest.raises(InputError, match=r"^loss\.share is 0\.5; expected a part$"):
        records.require(part, "share", False, "a part", where="loss")


def test_a_whole_number_becomes_a_float_only_where_people_write_it(tmp_path: Path) -> None:
    assert type(records.from_dict(Whole, {"name": "a", "rate": 2}).rate) is int
    (tmp_path / "a.toml").write_text('name = "a"\nrate = 2\n[[parts]]\nsize = [1, 2]\nshare = 1')
    read = records.read_toml(Whole, tmp_path / "a.toml")
    assert (type(read.rate), type(read.parts[0].share)) == (float, float)
    assert type(read.parts[0].size[0]) is int


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cuont": 1}, r"^here\.cuont is no known key; did you mean 'count'\?"),
        ({"zzz": 1}, r"^here\.zzz is no known key; expected one of \['count', 'mode', "),
        ({"parts": [{}]}, r"^here\.parts\[0\]\.size is missing; expected a value for it"),
        (
            {"parts": [{"size": [1, 2, 3]}]},
            r"parts\[0\]\.size is \[1, 2, 3\]; expected a list of 2",
        ),
        ({"parts": [{"size": [1, "2"]}]}, r"parts\[0\]\.size\[1\] is '2'; expected a whole number"),
        ({"parts": {}}, r"parts is \{\}; expected a list of tables"),
        ({"parts": [3]}, r"parts\[0\] is 3; expected a table"),
        ({"count": True}, "count is True; expected a whole number"),
        ({"count": 1.0}, "count is 1.0; expected a whole number"),
        ({"rate": "1"}, "rate is '1'; expected a number"),
        ({"rate": -1}, "rate is -1; expected a positive number"),
        ({"on": 1}, "on is 1; expected true or false"),
        ({"mode": "slow"}, "mode is 'slow'; expected one of 'fast', 'exact'"),
        ({"mode": ["fast"]}, r"mode is \['fast'\]; expected one of"),
        ({"names": [1]}, r"names\[0\] is 1; expected a text"),
        ({"place": 3}, "place is 3; expected a text or a list of texts"),
        ({"options": []}, r"options is \[\]; expected a table"),
        ({"name": None}, "name is None; expected a text"),
    ],
)
def test_what_does_not_fit_is_named_with_what_was_expected(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        records.from_dict(Whole, {"name": "a", **change}, "here")


def test_files_say_which_format_and_version_they_have() -> None:
    text = FORMAT.dumps(records.plain(WHOLE), indent=1)
    assert text.startswith('{\n "format": "xmag.Whole",\n "schema_version": 3,\n "name": "a"')
    assert records.from_dict(Whole, FORMAT.loads(text)) == WHOLE
    with pytest.raises(ValueError, match="JSON"):
        FORMAT.dumps({"rate": math.nan})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"a\.json' is not what Whole\.save wrote \(it is not JSON: .*\); make it again"),
        ("[" * 100_000, "nested deeper"),
        ('{"format": NaN}', "NaN is not a JSON number"),
        ("[]", "it holds a list"),
        ("{}", "it has format None, not 'xmag.Whole'"),
        ('{"format": "x"}', "it has format 'x', not 'xmag.Whole'"),
        ('{"format": "xmag.Whole"}', "it has schema_version None"),
        ('{"format": "xmag.Whole", "schema_version": true}', "it has schema_version True"),
        ('{"format": "xmag.Whole", "schema_version": 4}', "reads up to 3; upgrade it: pip"),
        ('{"format": "xmag.Whole", "schema_version": 1}', "no longer reads; make it again"),
    ],
)
def test_files_of_other_formats_and_versions_are_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(OutputError, match=message):
        FORMAT.load(tmp_path / "a.json")
    with pytest.raises(OutputError, match=r"none\.json' cannot be read .*; check the path"):
        FORMAT.load(tmp_path / "none.json")


def test_files_of_older_versions_are_brought_to_this_one() -> None:
    older = {"format": "xmag.Whole", "schema_version": 2, "number": 4}
    assert FORMAT.opened(older) == {"number": 4, "count": 8}
    assert older["schema_version"] == 2


def test_values_that_do_not_fit_become_the_error_of_the_format() -> None:
    for fault in (KeyError("x"), TypeError("y"), InputError("z")):
        with (
            pytest.raises(OutputError, match=r"the file is not what Whole\.save wrote \(.*[xyz]"),
            FORMAT.reading("the file"),
        ):
            raise fault
