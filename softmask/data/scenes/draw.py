"""Scenes drawn at any size, with captions and masks."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from PIL import Image

from softmask.data import rle
from softmask.data.scenes.background import paint_background
from softmask.data.scenes.captions import Caption
from softmask.data.scenes.concepts import concepts
from softmask.data.scenes.drawings import OPAQUE, Pose, drawing_of, warp
from softmask.data.scenes.layout import Scene, Split
from softmask.data.scenes.looks import vary

SUPERSAMPLING = 2


def render(scene: Scene, size: int) -> tuple[Image.Image, list[np.ndarray]]:
    """Image (RGB, ``size`` square) and one mask ``[size, size]`` bool of visible pixels per group.

    Drawings are rasterized for images of up to 256 pixels; larger images are blurred.
    """
    canvas = paint_background(scene.background, size * SUPERSAMPLING)
    pictures = [(drawing_of(one.drawn_by, one.concept).colors, one.pose) for one in scene.placements]
    image, visible = compose(canvas, pictures, looks=[one.look for one in scene.placements])
    return image, [np.logical_or.reduce([visible[k] for k in group]) for group in scene.groups]


def compose(
    canvas: Image.Image,
    pictures: Sequence[tuple[Sequence[Image.Image], Pose]],
    *,
    looks: Sequence[int | None] = (),
) -> tuple[Image.Image, list[np.ndarray]]:
    """Paste pictures, given by the color levels of their pyramids, on a canvas of `SUPERSAMPLING` times the image's
    side, from back to front, and average, so that a small image looks like a reduced large one. Without ``looks`` all
    pictures look as they are.

    Returns:
        The image, and for each picture ``[size, size]`` bool of its visible pixels.
    """
    side, size = canvas.width, canvas.width // SUPERSAMPLING
    labels = np.zeros((side, side), dtype=np.uint8)
    for number, ((levels, pose), look) in enumerate(zip_longest(pictures, looks), start=1):
        patch, (x, y) = warp(levels, pose, side)
        patch = patch.convert("RGBA") if look is None else vary(patch.convert("RGBA"), look)
        canvas.paste(patch, (x, y), patch)
        window = labels[y : y + patch.height, x : x + patch.width]
        opaque = np.asarray(patch.getchannel("A"))[: window.shape[0], : window.shape[1]] >= OPAQUE
        window[opaque] = number
    taken = np.zeros((size, size), dtype=bool)
    visible: list[np.ndarray] = []
    for number in range(len(pictures), 0, -1):  # front to back: the front takes pixels that are half covered
        mask = (_count(labels == number) >= SUPERSAMPLING**2 // 2) & ~taken
        taken |= mask
        visible.insert(0, mask)
    return canvas.reduce(SUPERSAMPLING), visible


def _count(inside: np.ndarray) -> np.ndarray:
    """Number of True values of ``[H, W]`` bool in each block of `SUPERSAMPLING` squared: uint8."""
    numbers, steps = inside.view(np.uint8), range(SUPERSAMPLING)  # strided sums: faster than sum() over short axes
    total = np.zeros_like(numbers[::SUPERSAMPLING, ::SUPERSAMPLING])
    for i in steps:
        for j in steps:
            total += numbers[i::SUPERSAMPLING, j::SUPERSAMPLING]
    return total


def encode_sample(scene: Scene, split: Split, size: int) -> dict[str, bytes]:
    """Members of a sample: "png", "txt" and "json" (write.py describes it)."""
    image, masks = render(scene, size)
    about = [
        {"concept": concepts()[scene.placements[group[0]].concept].name, "count": len(group)} for group in scene.groups
    ]
    return pack_sample(image, scene.caption, masks, about, split)


def pack_sample(
    image: Image.Image, caption: Caption, masks: Sequence[np.ndarray], about: Sequence[dict[str, Any]], split: str
) -> dict[str, bytes]:
    """Members of a sample whose objects' records end with the entries of ``about``."""
    image.save(stream := io.BytesIO(), "PNG", compress_level=1)
    objects = [
        {"phrase": caption.phrase(i), "span": list(caption.spans[i]), "mask": rle.encode(mask), **more}
        for i, (mask, more) in enumerate(zip(masks, about, strict=True))
    ]
    record = {"caption": caption.text, "objects": objects, "split": split}
    return {"png": stream.getvalue(), "txt": caption.text.encode(), "json": json.dumps(record).encode()}
