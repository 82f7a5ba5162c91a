"""soft_mask_attention against attention whose keys and values are projected, with biases, from masked tokens."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import softmask
from softmask import ops

pytestmark = pytest.mark.usefixtures("each_backend")

HEADS, WIDTH, FEATURES = 2, 4, 6


@dataclass
class Case:
    query: Tensor  # [N, H, T, E]
    tokens: Tensor  # [B, P, D]
    projections: list[Tensor]  # key and value weights [D, H * E], biases [H * E]
    weight: Tensor  # [N, P]
    index: Tensor  # [N]
    ignore: Tensor  # [B, P]

    def leaves(self) -> list[Tensor]:
        return [tensor.requires_grad_() for tensor in (self.query, self.tokens, *self.projections)]


def make(*, pairs: int = 5, images: int = 3, text: int = 3, patches: int = 7, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inner = HEADS * WIDTH
    ignore = torch.rand(images, patches, generator=generator) < 0.3
    ignore[:, 0] = False
    return Case(
        query=randn(pairs, HEADS, text, WIDTH),
        tokens=randn(images, patches, FEATURES),
        projections=[randn(FEATURES, inner), randn(FEATURES, inner), randn(inner), randn(inner)],
        weight=torch.rand(pairs, patches, generator=generator, dtype=torch.float64),
        index=torch.randint(images, (pairs,), generator=generator),
        ignore=ignore,
    )


def heads(tensor: Tensor) -> Tensor:
    return tensor.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)


def masked_then_projected(case: Case) -> Tensor:
    """The direct way: mask the tokens of each pair, project them, attend."""
    key_weight, value_weight, key_bias, value_bias = case.projections
    tokens = case.tokens[case.index] * case.weight.unsqueeze(-1)
    key, value = heads(tokens @ key_weight + key_bias), heads(tokens @ value_weight + value_bias)
    logits = case.query @ key.transpose(-2, -1) / WIDTH**0.5
    logits = logits.masked_fill(case.ignore[case.index][:, None, None], float("-inf"))
    return logits.softmax(-1) @ value


def projected_once(case: Case) -> Tensor:
    key_weight, value_weight, _, value_bias = case.projections  # the keys' bias cancels in the softmax
    return ops.soft_mask_attention(
        case.query,
        heads(case.tokens @ key_weight),
        heads(case.tokens @ value_weight),
        key_weight=case.weight,
        kv_index=case.index,
        value_bias=value_bias.unflatten(0, (HEADS, WIDTH)),
        key_padding_mask=case.ignore,
    )


@pytest.mark.parametrize("patches", [1, 7, 63, 130, 257])
def test_equals_masking_tokens_before_projection(patches: int) -> None:
    """Values, and gradients down to the image tokens and the projections."""
    case = make(patches=patches)
    leaves = case.leaves()
    expected, got = masked_then_projected(case), projected_once(case)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(expected, leaves, upstream)
    gradients = torch.autograd.grad(got, leaves, upstream, allow_unused=True)
    assert gradients[4] is None  # of the keys' bias, mathematically zero
    torch.testing.assert_close(wanted[4], torch.zeros_like(wanted[4]))
    for i in (0, 1, 2, 3, 5):
        torch.testing.assert_close(gradients[i], wanted[i])


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_every_option_equals_the_formula(weighted: bool, indexed: bool, padded: bool, scale: float | None) -> None:
    case = make(pairs=3)
    key, value = heads(case.tokens @ case.projections[0]), heads(case.tokens @ case.projections[1])
    bias = case.projections[3].unflatten(0, (HEADS, WIDTH))
    got = ops.soft_mask_attention(
        case.query,
        key,
        value,
        key_weight=case.weight if weighted else None,
        kv_index=case.index if indexed else None,
        value_bias=bias,
        key_padding_mask=case.ignore if padded else None,
        scale=scale,
    )
    for n in range(3):
        image = case.index[n] if indexed else n
        weight = case.weight[n] if weighted else torch.ones_like(case.weight[n])
        logits = weight * (case.query[n] @ key[image].transpose(-2, -1)) * (scale or WIDTH**-0.5)
        if padded:
            logits = logits.masked_fill(case.ignore[image], float("-inf"))
        expected = logits.softmax(-1) @ (value[image] * weight.unsqueeze(-1)) + bias[:, None]
        torch.testing.assert_close(got[n], expected)


@pytest.mark.parametrize("dead", [False, True])
def test_gradcheck(dead: bool) -> None:
    """Two pairs share an image; with `dead`, all its keys are padded."""
    case = make(pairs=3, images=2, text=2, patches=3)
    case.index = torch.tensor([0, 1, 0])
    case.ignore[0] = dead
    key, value = (heads(case.tokens @ weight).contiguous() for weight in case.projections[:2])
    leaves = (case.query, key, value, case.projections[3].unflatten(0, (HEADS, WIDTH)))

    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        options = {"key_weight": case.weight, "kv_index": case.index, "key_padding_mask": case.ignore}
        return ops.soft_mask_attention(query, key, value, value_bias=bias, **options)

    assert torch.autograd.gradcheck(attend, tuple(leaf.detach().requires_grad_() for leaf in leaves))


def test_rows_without_keys_are_zero_with_finite_gradients() -> None:
    case = make()
    case.ignore[case.index[0]] = True
    dead = case.index == case.index[0]
    assert not dead.all()
    leaves = case.leaves()
    out = projected_once(case)
    assert not out[dead].any() and out[~dead].abs().amin() > 0
    gradients = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)
    assert not gradients[0][dead].any() and not gradients[1][case.index[0]].any()


def test_key_weight_gets_no_gradient() -> None:
    case = make()
    case.query.requires_grad_()
    case.weight.requires_grad_()
    projected_once(case).sum().backward()
    assert case.query.grad.any() and case.weight.grad is None


def test_reference_copies_nothing_without_options(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(pairs=3)
    key, value = (heads(case.tokens @ weight) for weight in case.projections[:2])
    seen = []
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: seen.extend(a) or attention(*a, **k))
    with softmask.backend("reference"):
        ops.soft_mask_attention(case.query, key, value)
    assert [tensor.data_ptr() for tensor in seen] == [tensor.data_ptr() for tensor in (case.query, key, value)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_accumulates_in_fp32(dtype: torch.dtype) -> None:
    case = make(pairs=3)
    key, value = (heads(case.tokens @ weight) for weight in case.projections[:2])
    low = [tensor.to(dtype) for tensor in (case.query, key, value)]
    options = {"key_weight": case.weight.float(), "key_padding_mask": case.ignore}
    expected = ops.soft_mask_attention(*(tensor.float() for tensor in low), **options).to(dtype)
    got = ops.soft_mask_attention(*low, **options)
    assert got.dtype == dtype and torch.equal(got, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.soft_mask_attention(*low, **options), expected)


def test_strides_empty_batches_large_logits_and_ties() -> None:
    case = make()
    key, value = (heads(case.tokens @ weight) for weight in case.projections[:2])  # [B, P, H, E] in memory
    options = {"key_weight": case.weight, "kv_index": case.index}
    assert not key.is_contiguous()
    expected = ops.soft_mask_attention(case.query.contiguous(), key.contiguous(), value.contiguous(), **options)
    token_major = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(ops.soft_mask_attention(token_major, key, value, **options), expected)
    none = {"key_weight": case.weight[:0], "kv_index": case.index[:0]}
    assert ops.soft_mask_attention(case.query[:0], key, value, **none).shape == (0, HEADS, 3, WIDTH)
    assert ops.soft_mask_attention(case.query[:, :, :0], key, value, **options).shape == (5, HEADS, 0, WIDTH)
    assert ops.soft_mask_attention(case.query * 1e4, key, value, **options).isfinite().all()
    masked = ops.soft_mask_attention(
        case.query, key, value, key_weight=torch.zeros_like(case.weight), kv_index=case.index
    )
    assert not masked.any()  # every logit ties at 0 and every value is masked
    narrow = ops.soft_mask_attention(case.query, key, value[..., :3], **options)  # values of another width
    torch.testing.assert_close(narrow, expected[..., :3])


def test_compile_and_module() -> None:
    case = make()
    key, value = (heads(case.tokens @ weight) for weight in case.projections[:2])
    module = ops.SoftMaskAttention(scale=0.3)
    options = {"key_weight": case.weight, "kv_index": case.index, "key_padding_mask": case.ignore}
    query = case.query.requires_grad_()
    outputs = [
        torch.compile(module, fullgraph=True, backend="aot_eager")(query, key, value, **options),
        ops.soft_mask_attention(query, key, value, scale=0.3, **options),
    ]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), query)[0] for out in outputs))


def test_errors_name_the_bad_argument() -> None:
    case = make()
    key, value = (heads(case.tokens @ weight) for weight in case.projections[:2])
    base = {"query": case.query, "key": key, "value": value, "kv_index": case.index}
    for message, change in {
        r"query: expected shape \[N, H, T, E\]": {"query": case.query[0]},
        r"key: expected shape \[5, 2, P, 4\], got \[3, 2, 7, 4\]": {"kv_index": None},
        r"value: expected shape \[3, 2, 7, V\], got \[3, 2, 6, 4\]": {"value": value[:, :, 1:]},
        r"key: expected at least one image token": {"key": key[:, :, :0], "value": value[:, :, :0]},
        r"kv_index: expected shape \[5\], got \[4\]": {"kv_index": case.index[1:]},
        r"kv_index: expected int64": {"kv_index": case.index.int()},
        r"kv_index: expected 0 to 2, got 3": {"kv_index": torch.tensor([0, 1, 2, 3, 1])},
        r"kv_index: expected 0 to 2, got -1": {"kv_index": torch.tensor([0, 1, -1, 2, 1])},
        r"key_weight: expected shape \[5, 7\], got \[3, 7\]": {"key_weight": case.weight[:3]},
        r"value_bias: expected shape \[2, 4\], got \[8\]": {"value_bias": case.projections[3]},
        r"key_padding_mask: expected shape \[3, 7\], got \[5, 7\]": {"key_padding_mask": case.ignore[case.index]},
        r"key_padding_mask: expected bool": {"key_padding_mask": case.ignore.float()},
        r"value: expected device cpu, got meta": {"value": value.to("meta")},
    }.items():
        with pytest.raises(ValueError, match=message):
            ops.soft_mask_attention(**{**base, **change})
