"""Overlay of a slide's tissue and tiles, and a map of its embeddings as colours.

Colours are those of Okabe and Ito, which remain apart for colour-blind readers; kept and dropped
tiles also differ in the line's weight.
"""

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from xmag.bag import FeatureBag, Pictured, placed_tiles
from xmag.colours import component_colours, principal_components
from xmag.draw import frame
from xmag.draw.attention import tissue_inside
from xmag.draw.frame import FAINT, Key, Rgb, box_of
from xmag.notebook import FOR_PIECE, KEPT, TISSUE
from xmag.plan import TilePlan
from xmag.slide import Slide
from xmag.tissue import TissueMask

_DROPPED: dict[str, tuple[str, Rgb]] = {
    "tissue": ("too little tissue", (196, 196, 196)),
    "border": ("at the border", (213, 94, 0)),
    "roi": ("outside the region of interest", (204, 121, 167)),
    "damaged": ("damaged", (0, 0, 0)),
}

OVERLAY_PX = 1600
_SMALLEST_OUTLINED_PX = 5
"""Smallest tile in px that is outlined: below it, tiles are tinted only."""
_SMALLEST_DROPPED_PX = 24
"""Smallest dropped cell in px that is drawn; smaller cells are drawn only where they are tiles."""


def overlay(
    slide: Pictured,
    *,
    tissue: TissueMask | None = None,
    plan: TilePlan | None = None,
    max_px: int = OVERLAY_PX,
) -> Image.Image:
    """The slide's thumbnail with the outline of its tissue and its tiles, as an RGB image.

    The thumbnail is at most `max_px` on its longer side and begins at the image's top-left
    corner; below it stand the slide's name, a scale bar (where the scale is known) and a legend.
    Tiles of the plan have a blue outline, green where they are there for a small piece of tissue
    only, and cells that it dropped a thin one, by reason. The tissue is outlined in orange; the
    line lies inside of it. The legend says how much of the tissue the tiles cover.
    """
    picture = slide.thumbnail(max_px=max_px).convert("RGB")
    per_level0 = picture.width / slide.dimensions[0]
    keys = [] if plan is None else _draw_plan(picture, plan, per_level0)
    if tissue is not None:
        # The border of the mask, inside of it: 3 px wide on a picture of 1600 px.
        mask = frame.tissue_area(tissue, picture.size, per_level0)
        weight = max(1, round(max(picture.size) / 530))
        inner = mask.filter(ImageFilter.MinFilter(2 * weight + 1))
        picture.paste(TISSUE, (0, 0), ImageChops.subtract(mask, inner))
        text = f"tissue, {tissue.fraction:.0%} of the slide"
        keys.insert(0, Key(text=text, line=TISSUE, weight=2))
    return frame.framed(picture, slide, keys)


def feature_map(
    slide: Slide, bag: FeatureBag, *, tissue: TissueMask | None = None, max_px: int = 1600
) -> Image.Image:
    """The slide in grey with each tile coloured by its embedding, as an RGB image.

    Tiles of similar colour have similar embeddings: the first principal component of the bag's
    features runs from blue to yellow, the second from dark to light, the third from green to
    magenta (the order in which colour-blind readers lose them), each from its 2nd to its 98th
    percentile. Where tiles overlap, the mean of their colours is shown. With `tissue`, as in
    `heatmap`, that of the tiles alone is coloured. The colours of two slides cannot be compared.
    Raises BagError where the bag does not say how large its tiles are, and InputError where it
    belongs to another canvas.
    """
    coords, tiles = placed_tiles(bag, "a feature map")
    frame.require_canvas(slide, tiles, "the bag was")
    scores, shares = principal_components(np.asarray(bag.features, np.float64))
    colours = component_colours(scores).astype(np.float64)
    picture, mean, covered = frame.mean_on_grey(slide, colours, coords, tiles, max_px)
    if tissue is not None:
        covered &= tissue_inside(tissue, picture, coords, tiles)[..., None]
    painted = np.where(covered, np.rint(mean), np.asarray(picture)).astype(np.uint8)
    keys = []
    for component, share in enumerate(shares if len(bag) else ()):
        ends = np.zeros((2, 3))
        ends[:, component] = -1, 1
        fills = tuple(tuple(c) for c in component_colours(ends).tolist())
        text = f"component {component + 1} of {bag.features.shape[1]}, {share:.0%} of variance"
        keys.append(Key(text=text, line=FAINT, fills=fills))
    keys += frame.overlap_key(coords, tiles, "colour")
    return frame.framed(Image.blend(picture, Image.fromarray(painted), 0.7), slide, keys)


def _draw_plan(picture: Image.Image, plan: TilePlan, per_level0: float) -> list[Key]:
    """Draws the cells of the grid onto the picture; returns their legend."""
    side = plan.tiles.size_level0
    kept = [box_of(corner, side, per_level0) for corner in plan.coords]
    tint = picture.copy()
    for box in kept:
        ImageDraw.Draw(tint).rectangle(box, fill=KEPT)
    picture.paste(Image.blend(picture, tint, 0.09))
    draw = ImageDraw.Draw(picture)
    side_px = side * per_level0
    is_outlined = side_px >= _SMALLEST_OUTLINED_PX
    keys = []
    for reason, corners in plan.dropped.items():
        if not len(corners):
            continue
        text, line = _DROPPED[reason]
        for corner in corners if side_px >= _SMALLEST_DROPPED_PX else ():
            draw.rectangle(box_of(corner, side, per_level0), outline=line)
        keys.append(Key(text=f"{len(corners):,} {text}", line=line))
    weight = 2 if side_px >= _SMALLEST_DROPPED_PX else 1
    # Those for a piece last, as others may overlap them.
    for is_for_piece, line in ((False, KEPT), (True, FOR_PIECE)):
        for row in np.flatnonzero(plan.for_piece == is_for_piece) if is_outlined else ():
            draw.rectangle(kept[row], outline=line, width=weight)
    fill = ((215, 225, 240),)
    if pieces := int(np.count_nonzero(plan.for_piece)):
        text = f"{pieces:,} of them for a small piece of tissue"
        keys.insert(0, Key(text=text, line=FOR_PIECE, fills=fill, weight=2))
    tiles = "tile" if len(plan) == 1 else "tiles"
    share = "" if plan.coverage is None else f", {plan.coverage:.0%} of the tissue"
    return [Key(text=f"{len(plan):,} {tiles}{share}", line=KEPT, fills=fill, weight=2), *keys]
