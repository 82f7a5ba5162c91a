"""attentive_mask, against the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from harness import Bench, Run

from softmask import ops, reference


def make(batch: int, patches: int, tokens: int, width: int) -> Bench:
    torch.manual_seed(0)
    image, text = torch.randn(batch, patches, width), torch.randn(batch, tokens, width)
    options = {"ratio": 0.5, "token_padding_mask": torch.rand(batch, tokens) < 0.3}
    compiled = torch.compile(reference.attentive_mask, dynamic=False)
    return Bench(
        ours=Run(lambda: ops.attentive_mask(image, text, **options)),
        baselines={
            "reference": Run(lambda: reference.attentive_mask(image, text, **options)),
            "compiled reference": Run(lambda: compiled(image, text, **options)),
        },
        floor=lambda: image.sum(),
        floor_name="reading the patches once (sum)",
    )


CASES = {
    "B64 P256 T25 D256": partial(make, 64, 256, 25, 256),
    "B8 P196 T25 D768": partial(make, 8, 196, 25, 768),
}


@pytest.mark.parametrize("size", CASES)
def test_attentive_mask(bench, size: str) -> None:
    bench("attentive_mask", size, CASES[size])
