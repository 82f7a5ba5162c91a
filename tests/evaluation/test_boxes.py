"""Boxes on maps: overlap on cases made by hand, scores against a plain loop in fp64."""

from __future__ import annotations

import random

import pytest
import torch

from softmask.evaluation.tasks.boxes import box_scores, iou


@pytest.mark.parametrize("other, expected", [
    ([0, 0, 4, 2], 1.0),
    ([4, 0, 4, 2], 0.0),  # they touch
    ([9, 9, 1, 1], 0.0),
    ([2, 0, 4, 2], 4 / 12),
    ([0, 0, 4, 4], 0.5),
    ([1, 0.5, 2, 1], 2 / 8),
    ([3.5, -1, 10, 2], 0.5 / 27.5),
])  # fmt: skip
def test_overlap(other: list[float], expected: float) -> None:
    found = iou(torch.tensor([other, other]), torch.tensor([0, 0, 4, 2]))
    assert found.dtype == torch.float64 and found.tolist() == pytest.approx([expected] * 2, abs=1e-15)


def overlap_of_mattnet(box1: list[int], box2: list[int]) -> float:
    """The published overlap, of boxes that end at pixel x + w - 1."""
    left, top = max(box1[0], box2[0]), max(box1[1], box2[1])
    right, bottom = (min(box1[i] + box1[i + 2] - 1, box2[i] + box2[i + 2] - 1) for i in (0, 1))
    inside = (right - left + 1) * (bottom - top + 1) if left < right and top < bottom else 0
    return inside / (box1[2] * box1[3] + box2[2] * box2[3] - inside)


def test_overlap_is_the_published_one_at_one_half() -> None:
    """They differ only where the boxes share less than two pixels."""
    rng = random.Random(0)
    boxes = [[rng.randrange(6), rng.randrange(6), rng.randint(6, 14), rng.randint(6, 14)] for _ in range(300)]
    expected = [overlap_of_mattnet(box, boxes[0]) >= 0.5 for box in boxes]
    assert (iou(torch.tensor(boxes), torch.tensor(boxes[0])) >= 0.5).tolist() == expected and 5 < sum(expected) < 295


def plain_score(plane: list[list[float]], box: list[float], power: float) -> float:
    x, y, width, height = box
    total = area = 0.0
    for row, values in enumerate(plane):
        for column, value in enumerate(values):
            high = min(y + height, row + 1) - max(y, row)
            wide = min(x + width, column + 1) - max(x, column)
            if high > 0 and wide > 0:
                total, area = total + value * high * wide, area + high * wide
    return total / area**power if area else -torch.inf


@pytest.mark.parametrize("by, power", [("mean", 1.0), ("root", 0.5)])
def test_scores_equal_a_plain_loop(by: str, power: float) -> None:
    torch.manual_seed(0)
    plane, rng = torch.rand(13, 9), random.Random(1)
    boxes = [[rng.uniform(-4, 9), rng.uniform(-4, 13), rng.uniform(0.1, 12), rng.uniform(0.1, 12)] for _ in range(200)]
    boxes += [[0, 0, 9, 13], [3, 4, 1, 1], [2.25, 3.5, 0.25, 0.125], [9, 0, 5, 5], [-3, 2, 3, 4]]
    found = box_scores(plane, torch.tensor(boxes, dtype=torch.float64), by=by)  # type: ignore[arg-type]
    expected = [plain_score(plane.double().tolist(), box, power) for box in boxes]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert found[-2:].tolist() == [-torch.inf] * 2
    whole = plane.double().sum() / (13 * 9) ** power
    assert found[200] == pytest.approx(whole.item(), rel=1e-12) and found[201] == plane[4, 3]
