"""attentive_mask, against the reference and against one matrix product."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Bench, Run
from softmask import ops, reference


def by_product(patches: Tensor, tokens: Tensor, *, ratio: float, token_padding_mask: Tensor) -> Tensor:
    """As written for speed: all cosine similarities from one matrix product, with which equal patches do not always
    tie."""
    similarity = F.normalize(patches, dim=-1) @ F.normalize(tokens, dim=-1).mT
    relevance = similarity.masked_fill(token_padding_mask[:, None], float("-inf")).amax(-1)
    chosen = relevance.topk(round(ratio * relevance.shape[1])).indices
    return torch.zeros_like(relevance, dtype=torch.bool).scatter_(1, chosen, True)


def make(batch: int, patches: int, tokens: int, width: int) -> Bench:
    torch.manual_seed(0)
    image, text = torch.randn(batch, patches, width), torch.randn(batch, tokens, width)
    options = {"ratio": 0.5, "token_padding_mask": torch.rand(batch, tokens) < 0.3}
    compiled = torch.compile(by_product, dynamic=False)
    return Bench(
        ours=Run(lambda: ops.attentive_mask(image, text, **options)),
        baselines={
            "reference": Run(lambda: reference.attentive_mask(image, text, **options)),
            "one product": Run(lambda: by_product(image, text, **options)),
            "compiled product": Run(lambda: compiled(image, text, **options)),
        },
        floor=lambda: image.sum(),
        floor_name="reading the patches once (sum)",
    )


CASES = {
    "B64 P256 T25 D256": partial(make, 64, 256, 25, 256),
    "B8 P196 T25 D768": partial(make, 8, 196, 25, 768),
}
SMALL = {"B2 P16 T5 D8": partial(make, 2, 16, 5, 8)}


@pytest.mark.parametrize("size", CASES)
def test_attentive_mask(bench, size: str) -> None:
    bench("attentive_mask", size, CASES[size])
