"""Packed captions: packing and padding, repeated captions, the tokens whose states are computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from softmask.models.layers.packing import HostInts, OutputPositions, Packing

MASKS = {
    "ragged": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]).bool(),
    "with a hole": torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1]]).bool(),
    "full": torch.ones(2, 3).bool(),
}
for_each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


@for_each_mask
def test_pad_reverses_pack(mask: Tensor) -> None:
    packing = Packing.of(mask)
    padded = torch.randn(*mask.shape, 2, dtype=torch.float64)
    packed = packing.pack(padded)
    assert torch.equal(packed, padded[mask])
    assert torch.equal(packing.pad(packed), padded * mask[..., None])
    assert packing.cu_seqlens.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert torch.equal(packing.token_index[packing.flat_index], torch.arange(packing.size))


@for_each_mask
def test_gradcheck(mask: Tensor) -> None:
    packing = Packing.of(mask)
    packed = torch.randn(packing.size, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(packing.pad, packed)
    assert torch.autograd.gradcheck(packing.pack, torch.randn(*mask.shape, 2, dtype=torch.float64, requires_grad=True))


@for_each_mask
def test_take_repeats_captions(mask: Tensor) -> None:
    packing, rows = Packing.of(mask), torch.tensor([1, 0, 0, 1])
    tokens = packing.pack(torch.arange(mask.numel()).view(mask.shape))
    taken, index = packing.take(rows, int(mask[rows].sum()))
    assert torch.equal(taken.mask, mask[rows])
    assert torch.equal(
        tokens[index], torch.cat([tokens[packing.cu_seqlens[r] : packing.cu_seqlens[r + 1]] for r in rows])
    )


def test_output_positions_of_chosen_tokens() -> None:
    packing = Packing.of(MASKS["ragged"])
    chosen = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]]).bool()
    outputs = OutputPositions.of(packing, chosen, size=5, longest=3)
    places = packing.flat_index[outputs.index]
    assert torch.equal(places, chosen.flatten().nonzero()[:, 0])
    assert outputs.packing.mask.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    nothing = OutputPositions.of(packing, torch.zeros_like(chosen), size=0, longest=0)
    assert len(nothing.index) == 0 and nothing.packing.mask.shape == (3, 1)


def test_stale_counts_are_corrected_on_the_cpu() -> None:
    """A stale number of tokens, as of a batch that was cut, is used only on a device, where counting synchronizes."""
    assert Packing.of(MASKS["ragged"], 99).size == 9
    assert HostInts(torch.tensor(3), torch.tensor(5)).read() == [3, 5]
