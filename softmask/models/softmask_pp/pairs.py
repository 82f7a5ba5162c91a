"""Fused passes over pairs of captions and images, several kinds of pairs in one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from softmask.models.layers.packing import OutputPositions, Packing
from softmask.models.softmask_pp.fusion import CrossRecord, FusionEncoder, FusionStart, ImageKeys, PairIndex


@dataclass
class Prepared:
    """What a network's fused passes share: the captions before they look at an image, and the images' keys."""

    start: FusionStart
    keys: list[ImageKeys]

    @staticmethod
    def of(fusion: FusionEncoder, image_tokens: Tensor, text_tokens: Tensor, captions: Packing) -> Prepared:
        """image_tokens [B, P, D_image], text_tokens [S, D] of the captions."""
        return Prepared(fusion.start(text_tokens, captions), fusion.project(image_tokens))

    def detach(self) -> Prepared:
        return Prepared(self.start.detach(), [keys.detach() for keys in self.keys])


@dataclass
class Pairs:
    """Pairs of one kind: which captions and images, and which tokens' last states are read."""

    texts: Tensor  # [N] rows of the captions
    images: Tensor  # [N]
    tokens: int  # of those captions
    chosen: Tensor  # [N, T] bool
    count: int  # how many are chosen
    key_weight: Tensor | None = None  # [N, P] of the image tokens; None: all 1

    @cached_property
    def chosen_places(self) -> Tensor:
        """[count] places of the chosen tokens in [N * T]."""
        return torch.nonzero_static(self.chosen.flatten(), size=self.count)[:, 0]

    def with_chosen(self, other: Pairs) -> Pairs:
        """The same pairs with the tokens that another description of them chooses, none of which we have."""
        return replace(self, chosen=self.chosen | other.chosen, count=self.count + other.count)


def fuse(
    fusion: FusionEncoder,
    prepared: Prepared,
    kinds: list[Pairs],
    *,
    longest: int = 1,
    record_layer: int | None = None,
    grad_from: int = 0,
) -> tuple[list[Tensor], CrossRecord | None]:
    """The chosen states [count, D] of every kind, in one pass; a caption has at most `longest` of them.

    `record_layer`, `grad_from`: as in FusionEncoder, for all pairs of the pass.
    """
    start = prepared.start.take(_cat("texts", kinds), sum(kind.tokens for kind in kinds))
    pairs = PairIndex(kv_index=_cat("images", kinds), key_weight=_key_weight(kinds))
    counts = [kind.count for kind in kinds]
    outputs = OutputPositions.of(start.packing, _cat("chosen", kinds), size=sum(counts), longest=longest)
    states, record = fusion(
        start, prepared.keys, pairs, outputs=outputs, record_layer=record_layer, grad_from=grad_from
    )
    return list(states.split(counts)), record


def split_first(states: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """The chosen states of one kind of pairs: those of the N first tokens, all chosen, and the others."""
    column = pairs.chosen_places % pairs.chosen.shape[1]
    rows = len(pairs.texts)
    first = torch.nonzero_static(column == 0, size=rows)[:, 0]
    others = torch.nonzero_static(column != 0, size=pairs.count - rows)[:, 0]
    return states[first], states[others]


def row_numbers(tensor: Tensor) -> Tensor:
    """0 .. len - 1, on the tensor's device."""
    return torch.arange(len(tensor), device=tensor.device)


def first_tokens(attention_mask: Tensor) -> Tensor:
    """Where CLS stands: [B, T] bool."""
    first = torch.zeros_like(attention_mask, dtype=torch.bool)
    first[:, 0] = True
    return first


def _cat(name: str, kinds: list[Pairs]) -> Tensor:
    return torch.cat([getattr(kind, name) for kind in kinds])


def _key_weight(kinds: list[Pairs]) -> Tensor | None:
    given = next((kind.key_weight for kind in kinds if kind.key_weight is not None), None)
    if given is None:
        return None
    whole = given.new_ones(1, given.shape[1])
    weights = (whole.expand(len(kind.texts), -1) if kind.key_weight is None else kind.key_weight for kind in kinds)
    return torch.cat(list(weights))
