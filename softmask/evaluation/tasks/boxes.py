"""Boxes [x, y, width, height] in pixels, also in parts of them: their overlap, and how much of a map they hold."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

BoxScore = Literal["mean", "root"]
"""What a box is ranked by: the mean of the map over it, or the map's sum over the square root of its area, as in
ALBEF's code (`grounding_eval` of its dataset/utils.py with alpha=0.5), which favours large boxes."""

POWER: dict[BoxScore, float] = {"mean": 1.0, "root": 0.5}


def iou(boxes: Tensor, box: Tensor) -> Tensor:
    """Intersection over union of boxes [N, 4] with one box [4], [N] fp64."""
    boxes, box = boxes.double(), box.double()
    start = torch.maximum(boxes[:, :2], box[:2])
    end = torch.minimum(boxes[:, :2] + boxes[:, 2:], box[:2] + box[2:])
    shared = (end - start).clamp(min=0).prod(1)
    return shared / (boxes[:, 2:].prod(1) + box[2:].prod() - shared)


def box_scores(plane: Tensor, boxes: Tensor, *, by: BoxScore) -> Tensor:
    """Scores [N] fp64 of boxes [N, 4] on a map [h, w]. Pixels count by the part of them that a box covers, and a box by
    its part inside the map; one outside gets -inf."""
    rows = _covered(boxes[:, 1], boxes[:, 3], plane.shape[0])
    columns = _covered(boxes[:, 0], boxes[:, 2], plane.shape[1])
    total = (rows @ plane.double() * columns).sum(1)
    area = rows.sum(1) * columns.sum(1)
    return torch.where(area > 0, total / area.clamp(min=1e-300) ** POWER[by], -torch.inf)


def _covered(start: Tensor, length: Tensor, count: int) -> Tensor:
    """How much of each of `count` pixels the intervals from start [N] of length [N] cover, [N, count] in [0, 1]."""
    pixels = torch.arange(count, dtype=torch.float64)
    start, length = start.double()[:, None], length.double()[:, None]
    return (torch.minimum(start + length, pixels + 1) - torch.maximum(start, pixels)).clamp(min=0)
