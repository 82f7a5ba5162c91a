"""Scenes drawn at any size, with captions and masks."""

from __future__ import annotations

import io
import json

import numpy as np
from PIL import Image

from softmask.data import rle
from softmask.data.scenes.background import paint_background
from softmask.data.scenes.concepts import concepts
from softmask.data.scenes.drawings import OPAQUE, drawing_of, warp
from softmask.data.scenes.layout import Scene, Split

SUPERSAMPLING = 2


def render(scene: Scene, size: int) -> tuple[Image.Image, list[np.ndarray]]:
    """Image (RGB, ``size`` square) and one mask ``[size, size]`` bool of visible pixels per group.

    Drawn at `SUPERSAMPLING` times the size, then averaged, so that a small image looks like a reduced large one.
    Drawings are rasterized for images of up to 256 pixels; larger images are blurred.
    """
    side = size * SUPERSAMPLING
    canvas = paint_background(scene.background, side)
    labels = np.zeros((side, side), dtype=np.uint8)
    for number, placement in enumerate(scene.placements, start=1):
        patch, (x, y) = warp(drawing_of(placement.drawn_by, placement.concept).colors, placement, side)
        patch = patch.convert("RGBA")
        canvas.paste(patch, (x, y), patch)
        window = labels[y : y + patch.height, x : x + patch.width]
        opaque = np.asarray(patch.getchannel("A"))[: window.shape[0], : window.shape[1]] >= OPAQUE
        window[opaque] = number
    taken = np.zeros((size, size), dtype=bool)
    visible: list[np.ndarray] = []
    for number in range(len(scene.placements), 0, -1):  # front to back: the front takes pixels that are half covered
        mask = (_count(labels == number) >= SUPERSAMPLING**2 // 2) & ~taken
        taken |= mask
        visible.insert(0, mask)
    masks = [np.logical_or.reduce([visible[k] for k in group]) for group in scene.groups]
    return canvas.reduce(SUPERSAMPLING), masks


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
    image.save(stream := io.BytesIO(), "PNG", compress_level=1)
    objects = [
        {
            "phrase": scene.caption.phrase(i),
            "span": list(scene.caption.spans[i]),
            "mask": rle.encode(masks[i]),
            "concept": concepts()[scene.placements[group[0]].concept].name,
            "count": len(group),
        }
        for i, group in enumerate(scene.groups)
    ]
    record = {"caption": scene.caption.text, "objects": objects, "split": split}
    return {"png": stream.getvalue(), "txt": scene.caption.text.encode(), "json": json.dumps(record).encode()}
