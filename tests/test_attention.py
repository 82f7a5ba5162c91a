"""Plain attention by each library; flash-attn and xformers, which need a GPU, by stand-ins with their signatures."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from model_fixtures import small_config
from torch import Tensor

from softmask.models.attention import LIBRARIES, attend, check_library
from softmask.models.bert import FusionEncoder, PairIndex


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
    assert dropout_p == 0.0 and q.shape[2] == k.shape[2]
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
) -> Tensor:
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q.diff().max() <= max_seqlen_q and cu_seqlens_k.diff().max() <= max_seqlen_k
    assert cu_seqlens_q[-1] == len(q) and cu_seqlens_k[-1] == len(k) == len(v)
    starts = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    bounds = list(starts)
    parts = []
    for (q_begin, k_begin), (q_end, k_end) in zip(bounds, bounds[1:], strict=False):
        parts.append(flash_attn_func(q[None, q_begin:q_end], k[None, k_begin:k_end], v[None, k_begin:k_end])[0])
    return torch.cat(parts)


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None = None, p: float = 0.0
) -> Tensor:
    assert p == 0.0
    if attn_bias is not None:
        rows, length, heads, _ = query.shape
        assert attn_bias.shape == (rows, heads, length, key.shape[1]) and attn_bias.dtype == query.dtype
        assert attn_bias.stride(0) % 8 == 0
    heads_first = [x.transpose(1, 2) for x in (query, key, value)]
    return F.scaled_dot_product_attention(*heads_first, attn_mask=attn_bias).transpose(1, 2)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = {
        "flash_attn": [flash_attn_func, flash_attn_varlen_func],
        "xformers": [],
        "xformers.ops": [memory_efficient_attention],
    }
    for name, members in functions.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        for member in members:
            setattr(module, member.__name__, member)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("library", LIBRARIES)
def test_same_attention(library: str, masked: bool) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 5, 7, dtype=torch.float64).unbind()
    key, value = (torch.cat([x, x.flip(2)], 2) for x in (key, value))
    keep = torch.rand(2, 10) < 0.6 if masked else None
    mask = None if keep is None else keep[:, None, None]
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(attend(query, key, value, library=library, keep=keep), expected)


@pytest.mark.parametrize("library", ["eager", "flash_attn", "xformers"])
@pytest.mark.parametrize("soft", [False, True])
def test_same_fusion(library: str, soft: bool) -> None:
    """Layers with the same weights by another library: the same states, with a soft mask too."""
    config = small_config().text
    torch.manual_seed(0)
    plain = FusionEncoder(config, image_width=16).double().eval()
    config.attention = library
    other = FusionEncoder(config, image_width=16).double().eval()
    other.load_state_dict(plain.state_dict())
    states, image = torch.randn(3, 6, config.width).double(), torch.randn(2, 9, 16).double()
    mask = torch.arange(6) < torch.tensor([[6], [3], [1]])
    pairs = PairIndex(torch.tensor([1, 0, 1]), torch.rand(3, 9).double() if soft else None)
    expected, got = (model(states, mask, model.project(image), pairs)[0] for model in (plain, other))
    torch.testing.assert_close(got, expected)


def test_named_and_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="text.attention: expected one of 'sdpa', .*, got 'fast'"):
        check_library("fast")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ValueError, match="'flash_attn' needs the package flash_attn, which is not installed"):
        check_library("flash_attn")
