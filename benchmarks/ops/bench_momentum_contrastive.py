"""momentum_contrastive_loss forward and backward, against the steps of ALBEF's public code."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Bench, Run
from softmask import ops, reference


def albef(query: Tensor, teacher: Tensor, keys: Tensor, queue: Tensor, scale: Tensor, alpha: float) -> Tensor:
    """One direction at gamma 0: the queue is cloned and joined with the batch's keys, and two softmaxes run over all of
    it."""
    joined = torch.cat([keys, queue.clone()])
    with torch.no_grad():
        target = alpha * (scale * teacher @ joined.T).softmax(-1)
        target[torch.arange(len(query)), torch.arange(len(query))] += 1 - alpha
    return -((scale * query @ joined.T).log_softmax(-1) * target).sum(-1).mean()


def unit_rows(*shape: int) -> Tensor:
    return F.normalize(torch.randn(shape), dim=-1)


def make(batch: int, queue: int, width: int, *, gamma: float, transposed: bool = False) -> Bench:
    torch.manual_seed(0)
    image, text = (rows.requires_grad_() for rows in unit_rows(2, batch, width).unbind())
    teachers = dict(zip(("image_teacher", "text_teacher"), unit_rows(2, batch, width), strict=True))
    rows = unit_rows(2, queue, width)
    rows = rows.mT.contiguous().mT if transposed else rows
    queues = dict(zip(("image_queue", "text_queue"), rows, strict=True))
    scale = torch.tensor(1 / 0.07, requires_grad=True)
    leaves, options = (image, text, scale), {**teachers, **queues, "alpha": 0.4, "gamma": gamma}
    baselines = {"reference": Run(lambda: reference.momentum_contrastive_loss(image, text, scale, **options), leaves)}
    if gamma == 0.0:

        def both() -> Tensor:
            sides = (
                (image, teachers["image_teacher"], teachers["text_teacher"], queues["text_queue"]),
                (text, teachers["text_teacher"], teachers["image_teacher"], queues["image_queue"]),
            )
            return 0.5 * sum(albef(*side, scale, 0.4) for side in sides)

        baselines["ALBEF's steps"] = Run(both, leaves)
    query, keys = image.detach(), queues["text_queue"] if queue else teachers["text_teacher"]
    return Bench(
        ours=Run(lambda: ops.momentum_contrastive_loss(image, text, scale, **options), leaves),
        baselines=baselines,
        floor=lambda: query @ keys.T,
        floor_name="6 products",
        floor_times=6.0,
    )


CASES = {
    "B64 K65536 D256 gamma 0": partial(make, 64, 65536, 256, gamma=0.0),
    "B64 K65536 D256 gamma 0, [D, K]": partial(make, 64, 65536, 256, gamma=0.0, transposed=True),
    "B64 K65536 D256 gamma 2": partial(make, 64, 65536, 256, gamma=2.0),
    "B128 K0 D128 gamma 1": partial(make, 128, 0, 128, gamma=1.0),
}
SMALL = {"B4 K16 D8 gamma 0": partial(make, 4, 16, 8, gamma=0.0)}


@pytest.mark.parametrize("size", CASES)
def test_momentum_contrastive(bench, size: str) -> None:
    bench("momentum_contrastive_loss", size, CASES[size])
