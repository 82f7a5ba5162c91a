"""attentive_mask against cosines and sorting in Python."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from softmask import ops

pytestmark = pytest.mark.usefixtures("each_backend")


def make(patches: int = 7, tokens: int = 4, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    padding = torch.zeros(3, tokens, dtype=torch.bool)
    padding[1, 1:] = True
    return (
        torch.randn(3, patches, 5, generator=generator, dtype=torch.float64),
        torch.randn(3, tokens, 5, generator=generator, dtype=torch.float64),
        padding,
    )


def by_hand(patches: Tensor, tokens: Tensor, padding: Tensor, count: int, select: str) -> list[list[bool]]:
    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    masks = []
    for image, caption, ignore in zip(patches.tolist(), tokens.tolist(), padding.tolist(), strict=True):
        real = [token for token, skip in zip(caption, ignore, strict=True) if not skip]
        relevance = [max(cosine(patch, token) for token in real) for patch in image]
        sign = -1 if select == "high" else 1
        chosen = sorted(range(len(image)), key=lambda i: (sign * relevance[i], i))[:count]
        masks.append([i in chosen for i in range(len(image))])
    return masks


@pytest.mark.parametrize("select", ["high", "low"])
@pytest.mark.parametrize(
    ("patches", "ratio", "count"),
    [(1, 0.5, 0), (5, 0.5, 2), (7, 0.5, 4), (7, 0.0, 0), (7, 1.0, 7), (63, 0.25, 16), (130, 0.75, 98), (257, 0.5, 128)],
)
def test_equals_sorting_by_cosine(select: str, patches: int, ratio: float, count: int) -> None:
    """The count is rounded as in Python: halves go to the even number."""
    features, tokens, padding = make(patches)
    got = ops.attentive_mask(features, tokens, ratio=ratio, select=select, token_padding_mask=padding)
    assert got.dtype == torch.bool and got.tolist() == by_hand(features, tokens, padding, count, select)


@pytest.mark.parametrize("select", ["high", "low"])
def test_ties_go_to_the_lower_position(select: str) -> None:
    features, tokens, _ = make(1)
    same = features.expand(-1, 1000, -1)  # enough for an unstable sort to show
    assert ops.attentive_mask(same, tokens, ratio=0.3, select=select).tolist() == [[True] * 300 + [False] * 700] * 3
    features, _, padding = make(8)
    padding[:] = True  # no real token: every patch ties
    got = ops.attentive_mask(features, tokens, ratio=0.5, select=select, token_padding_mask=padding)
    assert got.tolist() == [[True] * 4 + [False] * 4] * 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 7, 25])
def test_equal_patches_tie_at_every_position(tokens: int, dtype: torch.dtype) -> None:
    """Also at twice the length. A matrix product may round the first and the last rows differently."""
    generator = torch.Generator().manual_seed(tokens)
    for patches, width in ((7, 33), (63, 256), (130, 7), (257, 130), (577, 1)):
        patch, text = (torch.randn(2, n, width, generator=generator).to(dtype) for n in (1, tokens))
        features = patch.repeat(1, patches, 1)
        features[:, ::2] *= 2
        for select in ("high", "low"):
            got = ops.attentive_mask(features, text, ratio=0.5, select=select)
            count = round(0.5 * patches)
            assert got.tolist() == [[True] * count + [False] * (patches - count)] * 2, (patches, width, select)


def test_high_and_low_are_complementary() -> None:
    features, tokens, padding = make(8)
    options = {"ratio": 0.5, "token_padding_mask": padding}
    high = ops.attentive_mask(features, tokens, **options)
    assert torch.equal(high, ~ops.attentive_mask(features, tokens, select="low", **options))


def test_length_of_patches_does_not_matter() -> None:
    features, tokens, _ = make(63)
    stretched = features * torch.rand(3, 63, 1, dtype=torch.float64).add(0.1)
    expected = ops.attentive_mask(features, tokens, ratio=0.3)
    assert torch.equal(ops.attentive_mask(stretched, tokens, ratio=0.3), expected)
    strided = features.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(ops.attentive_mask(strided, tokens, ratio=0.3), expected)


def test_no_gradient_empty_batch_and_precision() -> None:
    features, tokens, padding = make()
    features.requires_grad_()
    mask = ops.attentive_mask(features, tokens, ratio=0.5)
    assert not mask.requires_grad
    assert ops.attentive_mask(features[:0], tokens[:0], ratio=0.5, token_padding_mask=padding[:0]).shape == (0, 7)
    zero = ops.attentive_mask(torch.zeros_like(features), tokens, ratio=0.5)  # a zero vector has no direction: all tie
    assert zero.tolist() == [[True] * 4 + [False] * 3] * 3
    for dtype in (torch.float16, torch.bfloat16):
        low = features.detach().to(dtype), tokens.to(dtype)
        expected = ops.attentive_mask(low[0].float(), low[1].float(), ratio=0.5)
        assert torch.equal(ops.attentive_mask(*low, ratio=0.5), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(ops.attentive_mask(*low, ratio=0.5), expected)


def test_compile_and_module() -> None:
    features, tokens, padding = make()
    module = ops.AttentiveMask(ratio=0.4, select="low")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = ops.attentive_mask(features, tokens, ratio=0.4, select="low", token_padding_mask=padding)
    assert torch.equal(compiled(features, tokens, token_padding_mask=padding), expected)
    for length in range(2, 14):  # more lengths than torch.compile specializes on
        expected = ops.attentive_mask(features, tokens[:, :1].repeat(1, length, 1), ratio=0.4, select="low")
        assert torch.equal(compiled(features, tokens[:, :1].repeat(1, length, 1)), expected)


def test_errors_name_the_bad_argument() -> None:
    features, tokens, padding = make()
    base = {"patches": features, "tokens": tokens, "ratio": 0.5}
    for message, change in {
        r"patches: expected shape \[B, P, D\]": {"patches": features[0]},
        r"tokens: expected shape \[3, T, 5\], got \[2, 4, 5\]": {"tokens": tokens[1:]},
        r"tokens: expected at least one token": {"tokens": tokens[:, :0]},
        r"tokens: expected float32 or": {"tokens": tokens.long()},
        r"token_padding_mask: expected shape \[3, 4\], got \[3, 3\]": {"token_padding_mask": padding[:, 1:]},
        r"token_padding_mask: expected bool": {"token_padding_mask": padding.long()},
        r"select: expected one of 'high', 'low', got 'top'": {"select": "top"},
        r"ratio: expected 0 to 1, got 1.5": {"ratio": 1.5},
        r"tokens: expected device cpu, got meta": {"tokens": tokens.to("meta")},
    }.items():
        with pytest.raises(ValueError, match=message):
            ops.attentive_mask(**{**base, **change})
