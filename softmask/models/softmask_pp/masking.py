"""The random draws of a training step: masked tokens, a word of every caption and hard negatives. None of them waits
for a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softmask.models.config import SpecialIds
from softmask.models.layers.packing import is_cls_or_sep

IGNORE = -100


@dataclass
class MaskedText:
    input_ids: Tensor  # [B, T] with masked, replaced and kept tokens
    labels: Tensor  # [B, T] the original token where one was chosen, else IGNORE


@dataclass
class Draws:
    """What a step draws at random. A field that is given is used instead: for tests, benchmarks and comparisons."""

    masked: MaskedText | None = None
    hard_text: Tensor | None = None  # [B] a caption for every image
    hard_image: Tensor | None = None  # [B] an image for every caption
    word_index: Tensor | None = None  # [B, S] token positions of the word to mask, -1 pads


def mask_tokens(input_ids: Tensor, special: SpecialIds, *, vocab_size: int, probability: float) -> MaskedText:
    """BERT's masking as ALBEF does it: of the chosen tokens 80 % become MASK, 10 % a random token, 10 % stay.

    PAD, CLS and SEP are never chosen. input_ids [B, T] int64.
    """
    chosen = torch.rand(input_ids.shape, device=input_ids.device) < probability
    chosen &= (input_ids != special.pad) & ~is_cls_or_sep(input_ids, special)
    labels = input_ids.masked_fill(~chosen, IGNORE)
    how = torch.rand(input_ids.shape, device=input_ids.device)
    masked = input_ids.masked_fill(chosen & (how < 0.8), special.mask)
    random = torch.randint_like(input_ids, vocab_size)
    replace = chosen & (how >= 0.8) & (how < 0.9)
    return MaskedText(input_ids=torch.where(replace, random, masked), labels=labels)


def pick_words(word_ids: Tensor, allowed: Tensor) -> Tensor:
    """A random word of every caption, uniformly: its number [B], -1 where there is no candidate.

    word_ids [B, T]: the word of each token, -1 for special tokens, padding and punctuation.
    allowed [B, T] bool: a word is a candidate if all of its tokens are allowed.
    """
    batch, length = word_ids.shape
    slot = word_ids.clamp_min(0)
    real = word_ids >= 0
    is_word = torch.zeros(batch, length, dtype=torch.bool, device=word_ids.device)
    spoiled = is_word.clone()
    is_word = is_word.scatter_reduce(1, slot, real, reduce="amax")
    spoiled = spoiled.scatter_reduce(1, slot, real & ~allowed, reduce="amax")
    candidates = is_word & ~spoiled
    noise = torch.rand(batch, length, device=word_ids.device).masked_fill(~candidates, -1.0)
    best, word = noise.max(dim=1)
    return torch.where(best >= 0, word, -1)


def word_positions(word_ids: Tensor, word: Tensor, *, max_tokens: int) -> Tensor:
    """Token positions of one word per caption: word_ids [B, T], word [B] -> [B, S], S = min(T, max_tokens), -1 pads."""
    length = word_ids.shape[1]
    member = (word_ids == word[:, None]) & (word[:, None] >= 0)
    position = torch.arange(length, device=word_ids.device).expand_as(word_ids)
    order = position.masked_fill(~member, length).sort(dim=1).values[:, :max_tokens]
    return order.masked_fill(order == length, -1)


def sample_negatives(similarity: Tensor, ids: Tensor) -> Tensor:
    """A hard negative for every row: similarity [B, B] logits, ids [B] -> column [B].

    Drawn from softmax(similarity) without the columns of the same image (equal ids) or, if that leaves none, without
    the row's own column alone.
    """
    return _without_own(_perturbed(similarity), ids).argmax(dim=1)


def two_negatives(similarity: Tensor, ids: Tensor, *, draw: bool) -> tuple[Tensor, Tensor]:
    """As `sample_negatives`, two different columns for every row; twice the same where there is no second one. Without
    `draw` the two most similar ones."""
    logits = _without_own(_perturbed(similarity) if draw else similarity, ids)
    logits, columns = logits.topk(min(2, len(ids)), dim=1)
    return columns[:, 0], torch.where(logits[:, -1] == -torch.inf, columns[:, 0], columns[:, -1])


def _perturbed(logits: Tensor) -> Tensor:
    """With Gumbel noise: the largest of a row are draws from its softmax without replacement. Unlike torch.multinomial
    it survives features that are not finite. The loss then tells the trainer to skip the step."""
    return logits - torch.empty_like(logits).exponential_().clamp_min(1e-30).log()


def _without_own(logits: Tensor, ids: Tensor) -> Tensor:
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    same = ids[:, None] == ids[None, :]
    return logits.masked_fill(torch.where(same.all(dim=1, keepdim=True), own, same), -torch.inf)
