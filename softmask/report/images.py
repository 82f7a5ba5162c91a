"""Images of the report: heat maps over an image, soft-masked images, and data URIs."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from softmask import ops

# Deep violet over red and orange to pale yellow. Lightness rises evenly, so it stays readable in grey print.
HEAT = np.array(
    [[58, 18, 96], [110, 28, 104], [165, 44, 88], [207, 68, 70], [237, 105, 37], [251, 155, 6], [250, 208, 72]],
    dtype=np.float64,
)
PALEST = 0.55  # share of white in the grey image under the map
OPACITY = 0.88  # of the colour where the map is 1


def heat_colours(values: np.ndarray) -> np.ndarray:
    """Colours of map values in [0, 1], linear between the anchors. [...] -> [..., 3] in [0, 255]."""
    place = np.clip(values, 0, 1) * (len(HEAT) - 1)
    low = np.minimum(place.astype(np.int64), len(HEAT) - 2)
    part = (place - low)[..., None]
    return HEAT[low] * (1 - part) + HEAT[low + 1] * part


def heat_gradient() -> str:
    """The colours as a CSS gradient, for the legend."""
    stops = ", ".join("rgb({:.0f} {:.0f} {:.0f})".format(*colour) for colour in HEAT)
    return f"linear-gradient(90deg, {stops})"


def heat_overlay(image: Image.Image, plane: Tensor) -> Image.Image:
    """A map [h, w] in [0, 1] over the image in pale grey; higher values are more opaque."""
    grey = np.asarray(image.convert("L"), dtype=np.float64)[..., None]
    base = 255 * PALEST + grey * (1 - PALEST)
    values = plane.clamp(0, 1).numpy().astype(np.float64)
    opacity = OPACITY * values[..., None] ** 0.8
    mixed = base * (1 - opacity) + heat_colours(values) * opacity
    return Image.fromarray(mixed.round().astype(np.uint8))


def soft_masked(image: Image.Image, plane: Tensor, *, mean: tuple[float, ...], strength: float) -> Image.Image:
    """`ops.soft_mask` on pixels: marked pixels fade to the mean colour, which is zero in the network's input."""
    pixels = torch.from_numpy(np.array(image)).double() / 255 - torch.tensor(mean, dtype=torch.float64)
    flat = pixels.reshape(1, -1, 3)
    masked = ops.soft_mask(flat, plane.double().reshape(1, -1), strength=strength, normalize=None, num_prefix_tokens=0)
    faded = masked.reshape(pixels.shape) + torch.tensor(mean, dtype=torch.float64)
    return Image.fromarray((255 * faded).round().clamp(0, 255).to(torch.uint8).numpy())


def limited(image: Image.Image, longest: int) -> Image.Image:
    """The image, reduced if a side is longer than `longest` pixels."""
    scale = longest / max(image.size)
    if scale >= 1:
        return image
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)


def data_uri(image: Image.Image, *, quality: int = 90) -> str:
    """The image as a WebP data URI."""
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
