"""Stacked bars as a PNG: where the time of a slide goes."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, BAR, GAP, LEFT, TOP = 1100, 44, 30, 250, 64
COLOURS = ("#4477aa", "#ccbb44", "#66ccee", "#228833", "#ee6677", "#aa3377", "#bbbbbb")


def stacked_bars(title: str, bars: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Write a picture of `bars`: for each label, the parts of its bar in milliseconds."""
    longest = max(sum(parts.values()) for parts in bars.values())
    scale = (WIDTH - LEFT - 110) / longest
    names = list(dict.fromkeys(name for parts in bars.values() for name in parts))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    height = TOP + len(bars) * (BAR + GAP) + 50
    image = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(image)
    large, small = ImageFont.load_default(size=20), ImageFont.load_default(size=16)
    draw.text((20, 18), title, "#222222", large)
    y = TOP
    for label, parts in bars.items():
        draw.text((LEFT - 12, y + BAR / 2), label, "#222222", small, anchor="rm")
        x = float(LEFT)
        for name, milliseconds in parts.items():
            width = milliseconds * scale
            draw.rectangle((x, y, x + max(width, 1), y + BAR), fill=colour[name])
            if width > 60:
                text = f"{milliseconds:.0f}"
                draw.text((x + width / 2, y + BAR / 2), text, "white", small, anchor="mm")
            x += width
        total = sum(parts.values())
        draw.text((x + 10, y + BAR / 2), f"{total:.0f} ms", "#222222", small, anchor="lm")
        y += BAR + GAP
    x = 20.0
    for name in names:
        draw.rectangle((x, y + 8, x + 16, y + 24), fill=colour[name])
        draw.text((x + 24, y + 16), name, "#222222", small, anchor="lm")
        x += 24 + draw.textlength(name, small) + 28
    image.save(path, optimize=True)
