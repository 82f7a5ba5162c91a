"""Other looks of a drawing: bent, recoloured, shaded and outlined, as another artist might have drawn it.

Pillow and tables change the pixels: NumPy's powers differ between processors in the last bit, and a scene has the same
bytes on all of them.
"""

from __future__ import annotations

from random import Random

from PIL import Image, ImageChops, ImageFilter

BENT, RECOLOURED, SHADED, OUTLINED = 0.8, 0.7, 0.3, 0.25  # share of the drawings
_MOST_BENT = 0.14  # of the side, by which a corner moves inwards
_LINES = ((0, 0, 0), (40, 30, 30), (60, 60, 80), (255, 255, 255))


def vary(patch: Image.Image, look: int) -> Image.Image:
    """An RGBA picture in another look, of the same size. Equal numbers give equal looks at every size."""
    rng = Random(look)
    if rng.random() < BENT:
        patch = _bend(patch, rng)
    alpha, colors = patch.getchannel("A"), patch.convert("RGB")
    if rng.random() < RECOLOURED:
        colors = _recolour(colors, rng)
    if rng.random() < SHADED:
        colors = _shade(colors, rng)
    if rng.random() < OUTLINED:
        colors, alpha = _outline(colors, alpha, rng)
    colors.putalpha(alpha)
    return colors


def _bend(patch: Image.Image, rng: Random) -> Image.Image:
    """Every corner moved by itself."""
    width, height = patch.size
    source: list[float] = []  # what the corners show: points beyond the picture, so that it gets smaller
    for x, y in ((0, 0), (0, height), (width, height), (width, 0)):
        right, down = width * rng.uniform(-0.02, _MOST_BENT), height * rng.uniform(-0.02, _MOST_BENT)
        source += [x + right if x else -right, y + down if y else -down]
    bent = patch.convert("RGBa").transform(patch.size, Image.Transform.QUAD, source, Image.Resampling.BILINEAR)
    return bent.convert("RGBA")


def _recolour(colors: Image.Image, rng: Random) -> Image.Image:
    """Another hue, mostly by less than 25 of 360 degrees, another saturation and brightness."""
    turn, saturation, gamma = round(rng.gauss(0, 8)), rng.uniform(0.5, 1.5), 1 / rng.uniform(0.6, 1.4)
    tables = [(level + turn) % 256 for level in range(256)]
    tables += [min(round(level * saturation), 255) for level in range(256)]
    tables += [round(255 * (level / 255) ** gamma) for level in range(256)]
    return colors.convert("HSV").point(tables).convert("RGB")


def _shade(colors: Image.Image, rng: Random) -> Image.Image:
    """Darker towards one side."""
    darkest = rng.uniform(0.6, 1.0)
    ramp = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize(colors.size)
    ramp = ramp.point([round(255 * darkest + (1 - darkest) * level) for level in range(256)])
    return ImageChops.multiply(colors, Image.merge("RGB", (ramp, ramp, ramp)))


def _outline(colors: Image.Image, alpha: Image.Image, rng: Random) -> tuple[Image.Image, Image.Image]:
    """Colors and alpha with a line around the picture."""
    width = rng.uniform(0.015, 0.035) * max(colors.size)
    wide = alpha.filter(ImageFilter.MaxFilter(2 * max(round(width), 1) + 1))
    outlined = Image.new("RGB", colors.size, rng.choice(_LINES))
    outlined.paste(colors, (0, 0), alpha)
    return outlined, wide
