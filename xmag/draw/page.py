"""One HTML file that a browser shows without a server: tables, pictures, and what they rest on.

The page may load nothing and run nothing but its own script: its Content-Security-Policy names the
hashes of script and style, and `default-src 'none'` refuses everything else. All text is escaped
here, or set as text by the script.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files as package_files
from itertools import count
from typing import Any

from xmag import files
from xmag.urls import Place, readable

_OWN_START = b'<!doctype html>\n<html lang="en" data-xmag="1">'
_BAR_PX = 172  # of an interval
_FIGURE_DPI, _CSS_DPI = 150, 96


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Cell of a table: what it shows, what it sorts and filters by, and classes of its style.

    A cell whose `kind` has "number" sorts as one; without a `value`, by what it shows.
    """

    shown: str
    value: float | str | None = None
    title: str = ""
    kind: str = ""


def escaped(text: str) -> Html:
    """Text as HTML shows it; what is HTML stays as it is."""
    return text if isinstance(text, Html) else Html(html.escape(readable(text), quote=True))


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Cell | str]],
    *,
    caption: str = "",
    kinds: Sequence[str] = (),
    opens: str = "",
) -> Html:
    """A table that the page's script sorts by its columns; `kinds` are classes of their heads.

    By default these are the first row's. With `opens`, each row has its number as the attribute of
    data that is called so.
    """
    rows = list(rows)
    own = [cell.kind if isinstance(cell, Cell) else "" for cell in (rows or [columns])[0]]
    head = "".join(
        f'<th scope="col" class="{kind}"><button type="button">{escaped(name)}</button></th>'
        for name, kind in zip(columns, kinds or own, strict=True)
    )
    body = "".join(
        f"<tr{f' data-{opens}={number}' if opens else ''}>{''.join(map(_cell, row, count()))}</tr>"
        for number, row in enumerate(rows)
    )
    above = f"<caption>{escaped(caption)}</caption>" if caption else ""
    return Html(
        f'<table class="sortable">{above}<thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>\n"
    )


def _cell(cell: Cell | str, place: int) -> str:
    cell = cell if isinstance(cell, Cell) else Cell(shown=cell)
    attributes = {"class": cell.kind.strip() or None, "title": cell.title or None}
    if cell.value is not None or "number" in cell.kind:
        attributes["data-value"] = "" if cell.value is None else str(cell.value)
    found = ((name, value) for name, value in attributes.items() if value is not None)
    told = "".join(f' {name}="{escaped(value)}"' for name, value in found)
    tag, scope = ("td", "") if place else ("th", ' scope="row"')
    return f"<{tag}{scope}{told}>{escaped(cell.shown)}</{tag}>"


_NUMBER = re.compile(r"(-?[\d,]+(?:\.\d+)?(?:e[+-]?\d+)?)(?: M)?(?: \(.*\)| to .*|–.*)?")
"""A number, and what may follow it: its interval."""


def as_cells(rows: Iterable[Sequence[str]]) -> list[list[Cell | str]]:
    """Rows of text with numbers, also those with an interval, as cells that sort by them."""

    def cell(text: str) -> Cell | str:
        found = _NUMBER.fullmatch(text)
        value = float(found[1].replace(",", "")) if found else None
        return text if value is None else Cell(shown=text, value=value, kind="number")

    return [list(map(cell, row)) for row in rows]


def interval_bar(value: float, low: float, high: float) -> Html:
    """An interval between 0 and 1 as a line, with a dot at the value."""
    x, y, z = (f"{_BAR_PX * share + 4:.1f}" for share in (low, value, high))
    end = _BAR_PX + 4
    return Html(
        f'<svg class="interval" viewBox="0 0 {end + 4} 16" aria-hidden="true">'
        f'<line class="axis" x1="4" x2="{end}" y1="8" y2="8"/>'
        f'<line class="span" x1="{x}" x2="{z}" y1="8" y2="8"/>'
        f'<circle class="value" cx="{y}" cy="8" r="4"/></svg>'
    )


def document(
    *,
    title: str,
    lead: str = "",
    tables: Sequence[Html],
    notes: Sequence[str] = (),
    figures: Mapping[str, bytes],
    settings: Mapping[str, Any] | None = None,
) -> bytes:
    """The page of results: tables, notes below them, figures (PNG files by what they show)."""
    shown = "".join(picture(data, text=text) for text, data in figures.items())
    told = ""
    for name, value in (settings or {}).items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        told += f"<dt>{escaped(name)}</dt><dd>{escaped(text)}</dd>"
    body = [
        f"<header><h1>{escaped(title)}</h1>",
        f'<p class="lead">{escaped(lead)}</p></header><main>',
        *(f'<div class="scroll">{each}</div>' for each in tables),
        *(f"<p>{escaped(note)}</p>" for note in notes),
        f'<h2>Figures</h2><div class="figures">{shown}</div>',
        f"<details><summary>Settings</summary><dl>{told}</dl></details>" if told else "",
        "</main><footer>The whole report is this file: it asks for nothing from anywhere.</footer>",
    ]
    return page(title=title, body=map(Html, body))


def picture(data: bytes, *, text: str) -> Html:
    """A figure of a PNG file's bytes; `text` says what it shows."""
    width = int.from_bytes(data[16:20], "big") * _CSS_DPI // _FIGURE_DPI
    return Html(
        f'<figure><img alt="{escaped(text)}" width="{width}" src="{data_url(data, "png")}">'
        f"<figcaption>{escaped(text)}</figcaption></figure>\n"
    )


def data_url(data: bytes, kind: str) -> str:
    """The bytes of an image file as a URL that holds them."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def block(name: str, content: Mapping[str, Any]) -> Html:
    """JSON that the script reads when it is asked for, and that no browser runs."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    # What could end the element, or open a comment in it, stands as an escape of JSON.
    safe = readable(text).replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")
    return Html(f'<script type="application/json" id="{escaped(name)}">{safe}</script>\n')


def part(name: str, **values: str) -> Html:
    """A file of the package with its ``{{names}}`` filled in; text is escaped."""
    text = _package_text(name)
    return Html(re.sub(r"\{\{(\w+)\}\}", lambda found: escaped(values[found[1]]), text))


def page(*, title: str, body: Iterable[str], script: str = "page.js") -> bytes:
    """The whole page: `body` is HTML, and `script` the file of the package that runs in it."""
    style = _package_text("page.css")
    code = _package_text("page.js") + ("" if script == "page.js" else _package_text(script))
    return part(
        "page.html", title=title, style_hash=_hash(style), script_hash=_hash(code),
        style=Html(style), script=Html(code), version=version("xmag"),
        body=Html("".join(map(escaped, body))),
    ).encode()  # fmt: skip


def write_page(place: Place, content: bytes) -> None:
    """Write a page; OutputError where that fails, or would replace what xmag did not write."""
    files.make_folder(place.parent)
    files.require_own(place, place.parent, lambda head: head.startswith(_OWN_START))
    files.write_bytes(place, content, inside=place.parent)


def _package_text(name: str) -> str:
    return (package_files("xmag.draw") / "html" / name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
