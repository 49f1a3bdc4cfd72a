"""Display of objects in notebooks: their repr, a picture and a table; and their public names.

Nothing is read or computed for it that an object does not have at hand, but for a thumbnail.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING
from xml.etree import ElementTree as Xml

import numpy as np
from numpy.typing import NDArray

from xmag.errors import XmagError

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURE_PX = 480
MOST_ROWS = 30
"""Rows of a table in a notebook; of more, a line says how many."""

TISSUE, KEPT, FOR_PIECE = (230, 159, 0), (0, 90, 160), (0, 158, 115)
"""Colours of tissue, of tiles, and of those for a small piece, in all pictures (Okabe and Ito)."""

_IMAGE_STYLE = "max-width: 100%; border: 1px solid #c4c4c4"
_PALE = 0.35
"""Share of its colour in the area of what also has an outline."""

Rows = Sequence[Sequence[object]]


class Shown:
    """Base of objects that show themselves in a notebook, and their public names in completion."""

    __slots__ = ()

    def _picture(self) -> "Image | None":
        """The picture to show; None for none."""
        return None

    def _rows(self) -> Rows:
        """The rows of the table to show, the first of which is its head; none for no table."""
        return ()

    def __dir__(self) -> Iterable[str]:
        names = super().__dir__()
        return [name for name in names if name.startswith("__") or not name.startswith("_")]

    def _repr_html_(self) -> str:
        try:
            picture = self._picture()
        except (XmagError, OSError):  # closed by now, or damaged: what is known is shown
            picture = None
        return html(repr(self), picture, self._rows())


def html(title: str, picture: "Image | None" = None, rows: Rows = ()) -> str:
    """HTML of a line of text, a picture inside of it, and a table; whatever they say is escaped."""
    page = Xml.Element("div")
    Xml.SubElement(page, "div").text = title.removeprefix("<").removesuffix(">")
    if picture is not None:
        data = f"data:image/png;base64,{base64.b64encode(png(picture)).decode()}"
        Xml.SubElement(page, "img", src=data, alt=title, style=_IMAGE_STYLE)
    if rows:
        table = Xml.SubElement(page, "table")
        for number, row in enumerate(rows[: MOST_ROWS + 1]):
            line = Xml.SubElement(table, "tr")
            for cell in row:
                text = Xml.SubElement(line, "td" if number else "th", style="text-align: left")
                text.text = "".join(c if c.isprintable() else "\ufffd" for c in str(cell))
        if (more := len(rows) - MOST_ROWS - 1) > 0:
            Xml.SubElement(page, "div").text = f"and {more:,} more"
    return Xml.tostring(page, encoding="unicode", method="html")


def png(picture: "Image") -> bytes:
    """The picture as a PNG."""
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def canvas_picture(
    size_level0: tuple[int, int],
    *,
    tissue: tuple[NDArray[np.bool_], float] | None = None,
    tiles: tuple[NDArray[np.int64], float, NDArray[np.uint8]] | None = None,
    outlined: bool = False,
) -> "Image":
    """The canvas of a slide without its pixels: where tissue is, and the tiles in their colours.

    `tissue` is the mask, and the level-0 px of one of its px; `tiles` are their corners and
    side in level-0 px, and their colours, uint8 (N, 3).
    """
    from PIL import Image

    scale = PICTURE_PX / max(size_level0)
    width, height = (max(1, round(length * scale)) for length in size_level0)
    page = np.full((height, width, 3), 255, np.uint8)
    mask, per_mask = tissue or (None, 1.0)
    if mask is not None and mask.size:
        rows, columns = (
            ((np.arange(count) + 0.5) / (scale * per_mask)).astype(np.int64)
            for count in (height, width)
        )
        inside = np.outer(rows < mask.shape[0], columns < mask.shape[1])
        at = mask[np.ix_(rows.clip(max=mask.shape[0] - 1), columns.clip(max=mask.shape[1] - 1))]
        page[at & inside] = np.rint(255 + _PALE * (np.array(TISSUE) - 255.0)).astype(np.uint8)
    corners, side, colours = tiles or ((), 0.0, ())
    for corner, colour in zip(corners, colours, strict=True):
        left, top = start = np.rint(corner * scale).astype(int)
        right, bottom = np.maximum(np.rint((corner + side) * scale).astype(int), start + 1)
        window = page[top:bottom, left:right]
        if outlined and min(right - left, bottom - top) > 3:
            window[[0, -1]] = window[:, [0, -1]] = colour
        else:
            window[:] = colour
    return Image.fromarray(page)
