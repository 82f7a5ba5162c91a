"""Masks in COCO's uncompressed run-length code.

``{"size": [h, w], "counts": [...]}``: the pixels in column-major order, as lengths of runs that alternate between 0
and 1, starting with zeros (the first run may be empty). Source: pycocotools ``mask.py`` and COCO's data format page.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Run-length code of a mask.

    Args:
        mask: ``[H, W]`` bool, or integers where non-zero means inside.

    Raises:
        ValueError: ``mask`` does not have two axes.
    """
    if mask.ndim != 2:
        raise ValueError(f"rle.encode: expected a mask of shape [H, W], got {list(mask.shape)}")
    flat = (mask != 0).ravel(order="F")
    changes = (np.flatnonzero(flat[1:] != flat[:-1]) + 1).tolist()
    # The first run is of zeros; its length is 0 if the mask starts with a one.
    starts = [0, *([0] if flat[:1].any() else []), *changes, flat.size]
    counts = [stop - start for start, stop in pairwise(starts)]
    return {"size": list(mask.shape), "counts": counts}


def decode(rle: Mapping[str, Any]) -> np.ndarray:
    """Mask of a run-length code, ``[H, W]`` bool; inverse of `encode`.

    Raises:
        ValueError: a run is negative, or the runs do not add up to ``H * W``.
    """
    height, width = rle["size"]
    try:
        counts = np.asarray(rle["counts"], dtype=np.int64)
    except OverflowError as error:
        raise ValueError(f"rle.decode: a run is too long ({error})") from error
    if (counts < 0).any() or counts.sum() != height * width:
        raise ValueError(
            f"rle.decode: expected non-negative runs that add up to {height} x {width} = {height * width} pixels, "
            f"got {len(counts)} runs with sum {counts.sum()} and minimum {counts.min(initial=0)}"
        )
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape((height, width), order="F")
