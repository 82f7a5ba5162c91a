"""What bench_step times: a model, a batch with captions of real lengths, and the draws that both sides share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from softmask.data import Batch
from softmask.models import SoftMaskPP, SpecialIds, softmask_pp
from softmask.models.masking import MaskedText, mask_tokens
from softmask.train.config import load_config

BERT = SpecialIds(pad=0, cls=101, sep=102, mask=103)
VOCABULARY = 30522
LONGEST = 25  # tokens of a caption, CLS and SEP included
MASKED = 0.15


@dataclass
class Draws:
    """What a step leaves to chance."""

    masked_ids: Tensor  # [B, T]
    labels: Tensor  # [B, T], -100 where MLM predicts nothing
    hard_text: Tensor  # [B]
    hard_image: Tensor  # [B]
    word_index: Tensor  # [B, S] token positions of the word that is masked, -1 pads


def make_model(config_file: Path) -> SoftMaskPP:
    """The configuration's model without dropout; MLM reads a caption of its own, as in ALBEF."""
    config = load_config(config_file).model
    text = replace(config.text, dropout=0.0, attention_dropout=0.0, vocab_size=config.text.vocab_size or VOCABULARY)
    torch.manual_seed(0)
    model = SoftMaskPP(replace(config, mask_text="mlm", text=text), special_ids=BERT)
    with torch.no_grad():
        for queue in (model.contrast.image_queue, model.contrast.text_queue):
            queue.copy_(torch.nn.functional.normalize(torch.randn_like(queue), dim=-1))
        model.itm_head.weight.mul_(10.0)  # for matches that depend on the picture
        for parameter in model.twin.parameters():
            parameter.add_(0.1 * parameter.std(correction=0) * torch.randn_like(parameter))
    return model.train()


def caption_lengths(size: int) -> Tensor:
    """[size] tokens of captions, spread as CC3M's: 11 on average between CLS and SEP, LONGEST with them at most."""
    drawn = torch.distributions.Gamma(torch.tensor(6.0), torch.tensor(0.55)).sample((size,))
    return (drawn.round().long() + 2).clamp(4, LONGEST)


def make_batch(model: SoftMaskPP, size: int) -> Batch:
    lengths = caption_lengths(size)
    position = torch.arange(int(lengths.max()))
    mask = position < lengths[:, None]
    ids = torch.randint(BERT.mask + 1, model.config.text.vocab_size, mask.shape)
    ids[:, 0] = BERT.cls
    ids.scatter_(1, lengths[:, None] - 1, BERT.sep)
    words = torch.where(mask & (position > 0) & (position < lengths[:, None] - 1), position - 1, -1)
    images = torch.randn(size, 3, *[model.config.vision.image_size] * 2)
    return Batch(images, ids.masked_fill(~mask, BERT.pad), mask, words, torch.arange(size))


def draw(model: SoftMaskPP, batch: Batch) -> Draws:
    """Masked tokens as in training, a word of one token and other pairs' texts and images with equal chances."""
    masked = mask_tokens(batch.input_ids, BERT, vocab_size=model.config.text.vocab_size, probability=MASKED)
    size, real = len(batch.images), batch.attention_mask.sum(1)
    own = torch.arange(size)
    others = [(own + torch.randint(1, size, (size,))) % size for _ in range(2)]
    word = 1 + (torch.rand(size) * (real - 2)).long()
    return Draws(masked.input_ids, masked.labels, *others, word[:, None])


@contextmanager
def fixed(draws: Draws) -> Iterator[None]:
    """The engine draws what was drawn before."""
    negatives = iter([draws.hard_text, draws.hard_image])
    chosen = {
        "mask_tokens": lambda *_, **__: MaskedText(draws.masked_ids, draws.labels),
        "sample_negatives": lambda *_: next(negatives),
        "word_positions": lambda *_, **__: draws.word_index,
    }
    before = {name: getattr(softmask_pp, name) for name in chosen}
    try:
        for name, function in chosen.items():
            setattr(softmask_pp, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(softmask_pp, name, function)
