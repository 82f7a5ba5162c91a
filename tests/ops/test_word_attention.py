"""word_attention against Grad-CAM as published: materialized attention, autograd, one word at a time."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from softmask import ops

pytestmark = pytest.mark.usefixtures("each_backend")

NORMALIZATIONS = [None, "minmax", "max", "sum"]


@dataclass
class Case:
    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor
    ignore: Tensor
    word_index: Tensor
    readout: Tensor  # of the score, a function of the attention output


def make(*, tokens: int = 6, patches: int = 9, heads: int = 2, width: int = 4, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    word_index = torch.tensor([[[1, 2], [3, -1], [-1, -1]], [[tokens - 1, 0], [-1, 2], [4, 4]]]).clamp_max(tokens - 1)
    ignore = torch.zeros(2, patches, dtype=torch.bool)
    ignore[1, patches // 2 + 1 :] = True
    return Case(
        query=randn(2, heads, tokens, width),
        key=randn(2, heads, patches, width),
        value=randn(2, heads, patches, width),
        bias=randn(heads, width),
        ignore=ignore,
        word_index=word_index,
        readout=randn(2, heads, tokens, width),
    )


def published(case: Case, *, gradcam: bool, scale: float, prefix: int = 0) -> tuple[Tensor, Tensor]:
    """Maps [B, W, P - prefix] from the whole attention and its gradient, and the gradient at the attention output."""
    logits = scale * case.query @ case.key.transpose(-2, -1)
    logits = logits.masked_fill(case.ignore[:, None, None], float("-inf"))
    attention = logits.softmax(-1).requires_grad_()
    output = attention @ (case.value + case.bias[:, None])
    score = (output * case.readout).tanh().sum()
    attention_grad, output_grad = torch.autograd.grad(score, (attention, output))
    cams = attention * attention_grad.relu() if gradcam else attention
    batch, words, _ = case.word_index.shape
    maps = torch.zeros(batch, words, case.key.shape[2] - prefix, dtype=torch.float64)
    for b in range(batch):
        for w in range(words):
            rows = [cams[b, :, t, prefix:].mean(0) for t in case.word_index[b, w].tolist() if t >= 0]
            if rows:
                maps[b, w] = torch.stack(rows).mean(0)
    return maps.detach(), output_grad


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("patches", [7, 63, 257])
def test_equals_published_gradcam(patches: int, prefix: int, scale: float | None) -> None:
    case = make(patches=patches, heads=3, width=5)
    expected, output_grad = published(case, gradcam=True, scale=scale or 5**-0.5, prefix=prefix)
    maps = ops.word_attention(
        case.query,
        case.key,
        case.word_index,
        value=case.value,
        grad_output=output_grad,
        value_bias=case.bias,
        scale=scale,
        key_padding_mask=case.ignore,
        num_prefix_tokens=prefix,
    )
    torch.testing.assert_close(maps, expected)
    assert expected[0, 0].max() > 0 and not maps[0, 2].any()  # a word of only -1


def test_without_values_equals_attention() -> None:
    case = make()
    expected, _ = published(case, gradcam=False, scale=0.5)
    maps = ops.word_attention(case.query, case.key, case.word_index, key_padding_mask=case.ignore)
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(maps[0, :2].sum(-1), torch.ones(2, dtype=torch.float64))


def test_value_bias_equals_adding_it_to_the_values() -> None:
    case = make()
    common = {"grad_output": case.readout, "key_padding_mask": case.ignore}
    apart = ops.word_attention(case.query, case.key, case.word_index, value=case.value, value_bias=case.bias, **common)
    joined = ops.word_attention(case.query, case.key, case.word_index, value=case.value + case.bias[:, None], **common)
    torch.testing.assert_close(apart, joined)


def test_works_inside_a_training_step() -> None:
    """With SDPA's output and autograd.grad: .grad stays unset, and the step's own backward still runs."""
    case = make()
    leaves = [tensor.requires_grad_() for tensor in (case.query, case.key, case.value)]
    output = F.scaled_dot_product_attention(*leaves, attn_mask=~case.ignore[:, None, None])
    score = (output * case.readout).tanh().sum()
    (output_grad,) = torch.autograd.grad(score, output, retain_graph=True)
    maps = ops.word_attention(
        *leaves[:2], case.word_index, value=leaves[2], grad_output=output_grad, key_padding_mask=case.ignore
    )
    case.bias = torch.zeros_like(case.bias)
    expected, _ = published(case, gradcam=True, scale=0.5)
    assert not maps.requires_grad
    torch.testing.assert_close(maps, expected)
    assert all(leaf.grad is None for leaf in leaves)
    score.backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("normalize", NORMALIZATIONS[1:])
def test_maps_are_normalized_after_the_prefix_is_dropped(normalize: str) -> None:
    case = make()
    case.key[:, :, 0] *= 10  # a prefix token that would be the maximum
    options = {"num_prefix_tokens": 1, "key_padding_mask": case.ignore}
    plain = ops.word_attention(case.query, case.key, case.word_index, **options)
    maps = ops.word_attention(case.query, case.key, case.word_index, normalize=normalize, **options)
    for got, raw in zip(maps.flatten(0, 1).tolist(), plain.flatten(0, 1).tolist(), strict=True):
        low = min(raw) if normalize == "minmax" else 0.0
        top = sum(raw) if normalize == "sum" else max(raw)
        assert got == pytest.approx([(value - low) / (top - low + 1e-7) for value in raw], rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_gradcheck(normalize: str | None) -> None:
    case = make(tokens=5, patches=4, width=3)
    leaves = (case.query, case.key, case.value, case.readout, case.bias)

    def maps(query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, bias: Tensor) -> Tensor:
        return ops.word_attention(
            query,
            key,
            case.word_index[:, :2],
            value=value,
            grad_output=grad_output,
            value_bias=bias,
            key_padding_mask=case.ignore,
            normalize=normalize,
            differentiable=True,
        )

    assert torch.autograd.gradcheck(maps, tuple(leaf.requires_grad_() for leaf in leaves))


def test_rows_without_keys_are_zero_with_finite_gradients() -> None:
    case = make()
    leaves = [t.requires_grad_() for t in (case.query, case.key, case.value, case.readout)]
    ignore = case.ignore.clone()
    ignore[1] = True
    for normalize in NORMALIZATIONS:
        maps = ops.word_attention(
            *leaves[:2],
            case.word_index,
            value=leaves[2],
            grad_output=leaves[3],
            key_padding_mask=ignore,
            normalize=normalize,
            differentiable=True,
        )
        assert not maps[1].any() and maps[0, 0].any()
        for gradient in torch.autograd.grad(maps.square().sum(), leaves):
            assert gradient.isfinite().all() and not gradient[1].any()


def test_one_token_words_strides_and_empty_batches() -> None:
    case = make()
    single = case.word_index[..., 0]
    expected = ops.word_attention(case.query, case.key, single.unsqueeze(-1))
    assert torch.equal(ops.word_attention(case.query, case.key, single), expected)
    token_major = case.query.transpose(1, 2).contiguous().transpose(1, 2)  # [B, T, H, E] in memory, as in models
    wide = torch.cat([case.key, case.key], -1)[..., :4]
    assert not token_major.is_contiguous() and not wide.is_contiguous()
    torch.testing.assert_close(ops.word_attention(token_major, wide, single), expected, rtol=0, atol=1e-15)
    assert ops.word_attention(case.query[:0], case.key[:0], single[:0]).shape == (0, 3, 9)
    assert ops.word_attention(case.query, case.key, single[:, :0]).shape == (2, 0, 9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_accumulates_in_fp32(dtype: torch.dtype) -> None:
    """Low-precision inputs add only their own rounding, autocast none."""
    case = make()
    inputs = [tensor.to(dtype) for tensor in (case.query, case.key, case.value, case.readout)]

    def maps(query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor) -> Tensor:
        return ops.word_attention(query, key, case.word_index, value=value, grad_output=grad_output)

    expected = maps(*(tensor.float() for tensor in inputs))
    assert expected.dtype == torch.float32
    assert torch.equal(maps(*inputs), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(maps(*inputs), expected)


def test_extreme_logits_and_ties() -> None:
    case = make()
    maps = ops.word_attention(case.query * 1e4, case.key, case.word_index)
    assert maps.isfinite().all() and maps[0, 0].sum() == pytest.approx(1.0)
    same = ops.word_attention(case.query, case.key[:, :, :1].expand(-1, -1, 9, -1), case.word_index)
    torch.testing.assert_close(same[0, 0], torch.full((9,), 1 / 9, dtype=torch.float64))


def test_compile_and_module() -> None:
    case = make()
    module = ops.WordAttention(num_prefix_tokens=1, normalize="max", differentiable=True)
    options = {"value": case.value, "grad_output": case.readout, "key_padding_mask": case.ignore}
    expected = ops.word_attention(
        case.query, case.key, case.word_index, num_prefix_tokens=1, normalize="max", **options
    )
    query = case.query.requires_grad_()
    got = torch.compile(module, fullgraph=True, backend="aot_eager")(query, case.key, case.word_index, **options)
    torch.testing.assert_close(got.detach(), expected)
    (compiled,) = torch.autograd.grad(got.square().sum(), query)
    (eager,) = torch.autograd.grad(module(query, case.key, case.word_index, **options).square().sum(), query)
    torch.testing.assert_close(compiled, eager)


def test_errors_name_the_bad_argument() -> None:
    case = make()
    query, key, index = case.query, case.key, case.word_index
    for message, call in {
        r"query: expected shape \[B, H, T, E\]": lambda: ops.word_attention(query[0], key, index),
        r"key: expected shape \[2, 2, P, 4\], got \[2, 1, 9, 4\]": lambda: ops.word_attention(query, key[:, :1], index),
        r"word_index: expected shape \[2, W\] .*, got \[1, 3, 2\]": lambda: ops.word_attention(query, key, index[:1]),
        r"word_index: expected int64, got torch.int32": lambda: ops.word_attention(query, key, index.int()),
        r"value, grad_output: expected both or neither, got value alone": lambda: ops.word_attention(
            query, key, index, value=case.value
        ),
        r"grad_output: expected shape \[2, 2, 6, 4\]": lambda: ops.word_attention(
            query, key, index, value=case.value, grad_output=case.value
        ),
        r"value_bias: expected None where no value is given": lambda: ops.word_attention(
            query, key, index, value_bias=case.bias
        ),
        r"key_padding_mask: expected bool": lambda: ops.word_attention(
            query, key, index, key_padding_mask=case.ignore.float()
        ),
        r"num_prefix_tokens: expected 0 to 8 of the 9 keys, got 9": lambda: ops.word_attention(
            query, key, index, num_prefix_tokens=9
        ),
        r"word_index: expected -1 to 5, got 6": lambda: ops.word_attention(query, key, index + 1),
        r"word_index: expected -1 to 5, got -2": lambda: ops.word_attention(query, key, index - 1),
        r"normalize: expected one of": lambda: ops.word_attention(query, key, index, normalize="l2"),
        r"word_index: expected device cpu, got meta": lambda: ops.word_attention(query, key, index.to("meta")),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
