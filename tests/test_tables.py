"""CSV tables as spreadsheets and people save them."""

from pathlib import Path

import pytest

from xmag.errors import InputError
from xmag.files import Row, is_missing, read_csv


def read(folder: Path, text: str | bytes) -> list[Row]:
    path = folder / "c.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_csv(path, required=("slide",), optional=("mpp", "id", "features"))


@pytest.mark.parametrize(
    "header",
    ["slide, mpp", "Slide,MPP", " SLIDE ,\tmpp\u00a0", '"slide", "Mpp"', "\ufeffslide,mpp"],
)
def test_blanks_and_case_of_headers_do_not_count(tmp_path: Path, header: str) -> None:
    (row,) = read(tmp_path, f"{header}\r\na.svs,0.25\r\n")
    assert (row.get("slide"), row.get("mpp")) == ("a.svs", "0.25")


def test_values_lose_the_blanks_around_them_alone(tmp_path: Path) -> None:
    rows = read(tmp_path, 'slide,id\n  a b.svs\t, \u00a0x y \n"c, d.svs", "z"\n')
    values = [(row.get("slide"), row.get("id")) for row in rows]
    assert values == [("a b.svs", "x y"), ("c, d.svs", "z")]


# What pandas.read_csv takes for missing by default, but for MSVC's old spellings of NaN.
PANDAS = ["", "#N/A", "-NaN", "-nan", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan"]


@pytest.mark.parametrize("text", [*PANDAS, "null", "none", "NaT", "  ", " na "])
def test_missing_is_missing_and_says_so(tmp_path: Path, text: str) -> None:
    assert is_missing(text)
    (row,) = read(tmp_path, f"slide,mpp,id\n{text},{text},x\n")
    assert row.get("mpp") == ""
    with pytest.raises(InputError, match=r"line 2 of 'c\.csv' has no slide") as caught:
        row.required("slide")
    assert not text.strip() or f"'{text.strip()}' stands for a missing" in str(caught.value)


@pytest.mark.parametrize("text", ["0", "-", "no", "normal", "nana", "negative", "unknown", "False"])
def test_what_has_a_meaning_is_not_missing(text: str) -> None:
    assert not is_missing(text)


@pytest.mark.parametrize(
    ("column", "meant"),
    [
        ("mmp", "mpp"), ("mpp_um", "mpp"), ("mpp (µm)", "mpp"), ("MPP-X", "mpp"),
        ("feature", "features"), ("features_path", "features"), ("faetures", "features"),
    ],
)  # fmt: skip
def test_a_column_close_to_a_known_one_is_an_error_that_names_it(
    tmp_path: Path, column: str, meant: str
) -> None:
    with pytest.raises(InputError, match=f"did you mean '{meant}'"):
        read(tmp_path, f"slide,{column}\na.svs,x\n")
    # Where the known one is there, the other is something else.
    assert len(read(tmp_path, f"slide,{column},{meant}\na.svs,x,y\n")) == 1


@pytest.mark.parametrize(
    "column",
    [
        "patient",
        "label",
        "pid",
        "case_id",
        "slide_id",
        "side",
        "age",
        "stain",
        "split",
        "future",
        "feature_model",
        "mpp_source",
        "mpp_level",
        "tmp",
        "map",
    ],
)
def test_columns_of_other_meaning_are_left_alone(tmp_path: Path, column: str) -> None:
    assert len(read(tmp_path, f"slide,{column}\na.svs,x\n")) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Slide,slide \na,b\n", "the column 'slide' 2 times"),
        ("slide,mpp\na.svs,0,25\n", "line 2 of 'c.csv' has 3 values for 2 columns"),
        ('slide,mpp\n"a.svs,0.25\nb.svs,0.25\n', "unexpected end of data"),
        ("slides\na.svs\n", "a column 'slides'; did you mean 'slide'"),
        ("path\na.svs\n", r"the columns \['path'\]; expected a column 'slide'"),
        ("slide;mpp\na.svs;0,25\n", "'slide;mpp'.*commas"),
        ("", r"the columns \[\]"),
    ],
)
def test_a_table_that_would_be_misread_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, text)


def test_blank_rows_are_left_out_and_lines_are_those_of_the_file(tmp_path: Path) -> None:
    rows = read(tmp_path, 'slide,id\n\na.svs,1\n , \n"b\nc.svs",2\n,3,\nd.svs\n')
    assert [row.line for row in rows] == [3, 5, 7, 8]
    assert [row.get("id") for row in rows] == ["1", "2", "3", ""]
