"""Fused passes over pairs of captions and images; one pass takes several kinds of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from softmask.models.layers.numerics import at_least_fp32
from softmask.models.layers.packing import OutputPositions, Packing
from softmask.models.softmask_pp.fusion import CrossRecord, FusionEncoder, FusionStart, ImageKeys, PairIndex


@dataclass
class Prepared:
    """What the fused passes of one network share: the captions before their cross-attention, and the images' keys."""

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
    """Pairs of one kind: their captions and images, and the tokens whose last states are read."""

    texts: Tensor  # [N] rows of the captions
    images: Tensor  # [N]
    tokens: int  # in those captions
    chosen: Tensor  # [N, T] bool
    count: int  # of the chosen tokens
    key_weight: Tensor | None = None  # [N, P] weights of the image tokens; None: all 1

    @cached_property
    def chosen_index(self) -> Tensor:
        """[count] positions of the chosen tokens in [N * T]."""
        return torch.nonzero_static(self.chosen.flatten(), size=self.count)[:, 0]

    def with_chosen(self, other: Pairs) -> Pairs:
        """The same pairs with the tokens that `other` chooses too; the two choices are disjoint."""
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
    """The chosen states [count, D] of every kind, in one pass, at most `longest` of them in a caption.

    `record_layer`, `grad_from`: as in FusionEncoder.forward, for all pairs.
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
    """The chosen states of one kind of pairs: those of the N first tokens, all of them chosen, and the rest."""
    column = pairs.chosen_index % pairs.chosen.shape[1]
    rows = len(pairs.texts)
    first = torch.nonzero_static(column == 0, size=rows)[:, 0]
    others = torch.nonzero_static(column != 0, size=pairs.count - rows)[:, 0]
    return states[first], states[others]


def matching_losses(match: Tensor, others: Sequence[Tensor]) -> dict[str, Tensor]:
    """itm and, with soft-masked pairs, itm_soft, from matching logits [B, 2].

    match: the positive pairs. others: (hard image, caption), (image, hard caption) and, with soft masks, (masked image,
    caption) and perhaps (masked image, hard caption).
    """
    losses = {"itm": _match_loss(match=[match], mismatch=[others[0], others[1]])}
    if len(others) > 2:
        mismatch = [others[0], others[3]] if len(others) > 3 else []
        losses["itm_soft"] = _match_loss(match=[others[2]], mismatch=mismatch)
    return losses


def _match_loss(*, match: list[Tensor], mismatch: list[Tensor]) -> Tensor:
    """Mean cross-entropy of matching logits [N, 2], class 1 for `match` and 0 for `mismatch`."""
    logits = at_least_fp32(torch.cat(match + mismatch))
    labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    labels[: sum(len(part) for part in match)] = 1
    return F.cross_entropy(logits, labels)


def row_numbers(tensor: Tensor) -> Tensor:
    """0 .. len - 1, on the tensor's device."""
    return torch.arange(len(tensor), device=tensor.device)


def first_tokens(attention_mask: Tensor) -> Tensor:
    """[B, T] bool, true at CLS."""
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
