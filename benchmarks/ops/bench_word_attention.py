"""word_attention: Grad-CAM of one word per caption, against materializing all rows and against the words' rows
alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Bench, Run
from softmask import ops, reference


def every_row(query: Tensor, key: Tensor, index: Tensor, value: Tensor, grad_output: Tensor) -> Tensor:
    """The published recipe: attention and its gradient for all tokens, then the word's row."""
    attention = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
    maps = (attention * (grad_output @ value.mT).relu()).mean(1)  # [B, T, P]
    return maps.gather(1, index[..., None].expand(-1, -1, maps.shape[-1]))


def make(batch: int, heads: int, tokens: int, patches: int, width: int, words: int) -> Bench:
    torch.manual_seed(0)
    query, grad_output = torch.randn(2, batch, heads, tokens, width)
    key, value = torch.randn(2, batch, heads, patches, width)
    index = torch.randint(tokens, (batch, words))
    options = {"value": value, "grad_output": grad_output}
    compiled = torch.compile(reference.word_attention, dynamic=False)
    return Bench(
        ours=Run(lambda: ops.word_attention(query, key, index, **options)),
        baselines={
            "all rows": Run(lambda: every_row(query, key, index, value, grad_output)),
            "reference": Run(lambda: reference.word_attention(query, key, index, **options)),
            "compiled reference": Run(lambda: compiled(query, key, index, **options)),
        },
        floor=lambda: (key.sum(), value.sum()),
        floor_name="reading keys and values once (sum)",
    )


CASES = {
    "B64 H12 T30 P257 E64 W1": partial(make, 64, 12, 30, 257, 64, 1),
    "B8 H12 T30 P577 E64 W1": partial(make, 8, 12, 30, 577, 64, 1),
    "B2 H4 T12 P65 E32 W1": partial(make, 2, 4, 12, 65, 32, 1),
}
SMALL = {"B2 H2 T5 P17 E8 W1": partial(make, 2, 2, 5, 17, 8, 1)}


@pytest.mark.parametrize("size", CASES)
def test_word_attention(bench, size: str) -> None:
    bench("word_attention", size, CASES[size])
