"""soft_mask forward and backward, with a constant map as in training, and with the map's gradient."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import softmask
from benchmarks.harness import KERNELS, Bench, Run
from softmask import ops, reference


def make(batch: int, tokens: int, width: int, *, to_maps: bool) -> Bench:
    torch.manual_seed(0)
    features, upstream = torch.randn(2, batch, tokens, width)
    features.requires_grad_()
    maps = torch.rand(batch, tokens - 1, requires_grad=to_maps)
    leaves = (features, maps) if to_maps else (features,)
    compiled = torch.compile(reference.soft_mask, dynamic=False)
    plain = features.detach()

    def kernel() -> Tensor:  # "auto" chooses PyTorch for a constant map
        with softmask.backend(KERNELS):
            return ops.soft_mask(features, maps)

    return Bench(
        ours=Run(kernel, leaves, upstream),
        baselines={
            "reference": Run(lambda: reference.soft_mask(features, maps), leaves, upstream),
            "compiled reference": Run(lambda: compiled(features, maps), leaves, upstream),
        },
        floor=lambda: (plain.clone(), plain.clone()),
        floor_name="two clones of the features",
    )


CASES = {
    "64 x 577 x 768": partial(make, 64, 577, 768, to_maps=False),
    "64 x 577 x 768, map's gradient": partial(make, 64, 577, 768, to_maps=True),
    "8 x 65 x 128": partial(make, 8, 65, 128, to_maps=False),
}
SMALL = {"2 x 17 x 8": partial(make, 2, 17, 8, to_maps=False)}


@pytest.mark.parametrize("size", CASES)
def test_soft_mask(bench, size: str) -> None:
    bench("soft_mask", size, CASES[size])
