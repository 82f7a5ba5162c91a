"""soft_mask_attention forward and backward with its projections, against gathering, masking and projecting tokens."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from benchmarks.harness import DEVICE, Bench, Run
from softmask import ops, reference
from softmask.models.layers.attention import attend
from softmask.models.layers.packing import Packing


def gpu_libraries() -> list[str]:
    """The installed libraries that can run here; flash-attn does not support fp32."""
    known = ["xformers"] + (["flash_attn"] if torch.get_default_dtype() == torch.bfloat16 else [])
    return [name for name in known if DEVICE == "cuda" and find_spec(name) is not None]


def make(pairs: int, images: int, tokens: int, patches: int, width: int, heads: int) -> Bench:
    torch.manual_seed(0)
    text = torch.randn(pairs, tokens, width, requires_grad=True)
    image = torch.randn(images, patches, width, requires_grad=True)
    projections = [(torch.randn(width, width) * width**-0.5).requires_grad_() for _ in range(3)]
    upstream = torch.randn(pairs, heads, tokens, width // heads)
    index, weight = torch.arange(pairs) % images, torch.rand(pairs, patches)
    leaves = (text, image, *projections)

    def split(states: Tensor) -> Tensor:
        return states.unflatten(-1, (heads, -1)).transpose(1, 2)

    def projected(source: Tensor) -> list[Tensor]:
        states = (text, source, source)
        return [split(state @ projection) for state, projection in zip(states, projections, strict=True)]

    queries, keys = (Packing.full(pairs, length, text.device) for length in (tokens, patches))

    def published(library: str) -> Tensor:
        packed = (states.transpose(1, 2).flatten(0, 1) for states in projected(image[index] * weight[..., None]))
        mixed = attend(*packed, library=library, queries=queries, keys=keys)
        return mixed.unflatten(0, (pairs, tokens)).transpose(1, 2)

    options = {"key_weight": weight, "kv_index": index}
    return Bench(
        ours=Run(lambda: ops.soft_mask_attention(*projected(image), **options), leaves, upstream),
        baselines={
            "masked and projected per pair": Run(partial(published, "sdpa"), leaves, upstream),
            "reference": Run(lambda: reference.soft_mask_attention(*projected(image), **options), leaves, upstream),
        }
        | {
            f"masked and projected per pair, {library}": Run(partial(published, library), leaves, upstream)
            for library in gpu_libraries()
        },
        floor=Run(lambda: torch.cat([state.flatten() for state in projected(image)]), leaves),
        floor_name="the projections alone",
    )


CASES = {
    "N40 B8 T25 P257 D768": partial(make, 40, 8, 25, 257, 768, 12),
    "N8 B8 T25 P257 D768": partial(make, 8, 8, 25, 257, 768, 12),
    "N640 B128 T14 P64 D128": partial(make, 640, 128, 14, 64, 128, 4),
}
SMALL = {"N4 B2 T5 P17 D8": partial(make, 4, 2, 5, 17, 8, 2)}


@pytest.mark.parametrize("size", CASES)
def test_soft_mask_attention(bench, size: str) -> None:
    bench("soft_mask_attention", size, CASES[size])
