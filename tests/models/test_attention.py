"""Attention by each library; stand-ins with their signatures replace flash-attn and xformers, which need a GPU."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from softmask.models.config import AttentionLibrary, TextConfig, check_library
from softmask.models.layers.attention import attend
from softmask.models.layers.packing import Packing
from softmask.models.softmask_pp.fusion import FusionEncoder, PairIndex
from tests.support.model_fixtures import small_config


def one_sequence(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    by_head = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*by_head, is_causal=causal).transpose(1, 2)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    causal: bool = False,
) -> Tensor:
    assert dropout_p == 0.0 and q.shape[1] == k.shape[1]
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q.diff().max() <= max_seqlen_q and cu_seqlens_k.diff().max() <= max_seqlen_k
    assert cu_seqlens_q[-1] == len(q) and cu_seqlens_k[-1] == len(k) == len(v)
    starts = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    bounds = list(starts)
    parts = []
    for (q_begin, k_begin), (q_end, k_end) in zip(bounds, bounds[1:], strict=False):
        parts.append(one_sequence(q[None, q_begin:q_end], k[None, k_begin:k_end], v[None, k_begin:k_end], causal)[0])
    return torch.cat(parts)


class BlockDiagonalMask:
    def __init__(self, q_seqlen: list[int], kv_seqlen: list[int]) -> None:
        starts = ([sum(lengths[:n]) for n in range(len(lengths) + 1)] for lengths in (q_seqlen, kv_seqlen))
        self.starts = [torch.tensor(one, dtype=torch.int32) for one in starts]

    @classmethod
    def from_seqlens(cls, q_seqlen: list[int], kv_seqlen: list[int]) -> BlockDiagonalMask:
        return cls(q_seqlen, kv_seqlen)


class BlockDiagonalCausalMask(BlockDiagonalMask):
    pass


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: BlockDiagonalMask, p: float = 0.0
) -> Tensor:
    assert len(query) == len(key) == len(value) == 1
    longest = (int(starts.diff().max()) for starts in attn_bias.starts)
    causal = isinstance(attn_bias, BlockDiagonalCausalMask)
    packed = (query[0], key[0], value[0])
    return flash_attn_varlen_func(*packed, *attn_bias.starts, *longest, dropout_p=p, causal=causal)[None]


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = {
        "flash_attn": [flash_attn_varlen_func],
        "xformers": [],
        "xformers.ops": [memory_efficient_attention],
        "xformers.ops.fmha": [BlockDiagonalMask, BlockDiagonalCausalMask],
    }
    for name, members in functions.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        for member in members:
            setattr(module, member.__name__, member)
        monkeypatch.setitem(sys.modules, name, module)


def some_mask(rows: int, length: int) -> Tensor:
    """Captions of all lengths, and one with a hole."""
    mask = torch.arange(length) < torch.arange(1, rows + 1)[:, None] * length // rows
    mask[-1, 1] = False
    return mask


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("library", get_args(AttentionLibrary))
def test_every_library_gives_the_same_attention(library: str, ragged: bool) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(4, 5, 3, 7, dtype=torch.float64), torch.randn(4, 10, 3, 7, dtype=torch.float64)
    masks = [some_mask(4, 5), some_mask(4, 10)] if ragged else [torch.ones(4, 5).bool(), torch.ones(4, 10).bool()]
    queries, keys = map(Packing.of, masks)
    by_head = [x.transpose(1, 2) for x in (query, key, key.sin())]
    expected = F.scaled_dot_product_attention(*by_head, attn_mask=masks[1][:, None, None]).transpose(1, 2)[masks[0]]
    packed = queries.pack(query), keys.pack(key), keys.pack(key.sin())
    torch.testing.assert_close(attend(*packed, library=library, queries=queries, keys=keys), expected)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("library", get_args(AttentionLibrary))
def test_causal_attention_ignores_later_tokens(library: str, ragged: bool) -> None:
    torch.manual_seed(0)
    tokens, mask = torch.randn(4, 7, 3, 8, dtype=torch.float64), torch.ones(4, 7, dtype=torch.bool)
    mask = some_mask(4, 7) if ragged else mask
    packing = Packing.of(mask)
    by_head = [x.transpose(1, 2) for x in (tokens, tokens.cos(), tokens.sin())]
    seen = mask[:, None, None] & torch.ones(7, 7, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(*by_head, attn_mask=seen).transpose(1, 2)[mask]
    packed = (packing.pack(x) for x in (tokens, tokens.cos(), tokens.sin()))
    torch.testing.assert_close(attend(*packed, library=library, queries=packing, keys=packing, causal=True), expected)


@pytest.mark.parametrize("library", ["eager", "flash_attn", "xformers"])
@pytest.mark.parametrize("soft", [False, True])
def test_every_library_gives_the_same_fusion(library: str, soft: bool) -> None:
    """Layers with the same weights give the same states, also with a soft mask."""
    config = small_config().text
    torch.manual_seed(0)
    plain = FusionEncoder(config, image_width=16).double().eval()
    config.attention = library
    other = FusionEncoder(config, image_width=16).double().eval()
    other.load_state_dict(plain.state_dict())
    packing = Packing.of(some_mask(3, 6))
    states, image = torch.randn(packing.size, config.width).double(), torch.randn(2, 9, 16).double()
    pairs = PairIndex(torch.tensor([1, 0, 1]), torch.rand(3, 9).double() if soft else None)
    expected, got = (model(model.start(states, packing), model.project(image), pairs)[0] for model in (plain, other))
    torch.testing.assert_close(got, expected)


def test_unknown_and_missing_libraries_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="attention: expected 'sdpa', 'flash_attn', 'xformers' or 'eager', got 'fast'"):
        TextConfig(attention="fast")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ValueError, match="'flash_attn' needs the package flash_attn, which is not installed"):
        check_library("flash_attn")
