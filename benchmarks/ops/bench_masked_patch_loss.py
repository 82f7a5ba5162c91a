"""masked_patch_loss forward and backward, against the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.harness import Bench, Run
from softmask import ops, reference


def make(batch: int, side: int, patch_size: int) -> Bench:
    torch.manual_seed(0)
    images = torch.randn(batch, 3, side, side)
    patches = (side // patch_size) ** 2
    prediction = torch.randn(batch, patches, 3 * patch_size**2, requires_grad=True)
    mask = torch.rand(batch, patches) < 0.5
    options = {"patch_size": patch_size}
    compiled = torch.compile(reference.masked_patch_loss, dynamic=False)
    plain, leaves = prediction.detach(), (prediction,)
    return Bench(
        ours=Run(lambda: ops.masked_patch_loss(prediction, images, mask, **options), leaves),
        baselines={
            "reference": Run(lambda: reference.masked_patch_loss(prediction, images, mask, **options), leaves),
            "compiled reference": Run(lambda: compiled(prediction, images, mask, **options), leaves),
        },
        floor=lambda: (plain.clone(), images.sum()),
        floor_name="a clone of the prediction, reading the images",
    )


CASES = {"B64 256 px patch 16": partial(make, 64, 256, 16), "B8 224 px patch 16": partial(make, 8, 224, 16)}
SMALL = {"B2 16 px patch 4": partial(make, 2, 16, 4)}


@pytest.mark.parametrize("size", CASES)
def test_masked_patch_loss(bench, size: str) -> None:
    bench("masked_patch_loss", size, CASES[size])
