"""What bench_step times: a model, a batch with captions of realistic lengths, and the random draws that all sides
use."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softmask.data import Batch
from softmask.models import SoftMaskPP, SoftMaskPPConfig, SpecialIds, SyCoCa, SyCoCaConfig
from softmask.models.softmask_pp.masking import Draws, mask_tokens

BERT = SpecialIds(pad=0, cls=101, sep=102, mask=103)
VOCABULARY = {SoftMaskPPConfig: 30522, SyCoCaConfig: 64000}  # of BERT, and of open_clip's coca_base
LONGEST = 25  # tokens of a caption, CLS and SEP included
MASKED = 0.15


@dataclass
class Case:
    model: SoftMaskPP | SyCoCa
    batch: Batch
    draws: Draws | None = None


def make_case(config: SoftMaskPPConfig | SyCoCaConfig, size: int) -> Case:
    """`size` captioned images for the configuration's model, without dropout."""
    text = replace(config.text, vocab_size=config.text.vocab_size or VOCABULARY[type(config)])
    torch.manual_seed(0)
    if isinstance(config, SyCoCaConfig):
        model = SyCoCa(replace(config, text=text), special_ids=BERT).train()
        return Case(model, make_batch(model, size, spare=1))  # the last column, which the model drops, is padding
    model = make_softmask_pp(replace(config, text=text))
    batch = make_batch(model, size)
    return Case(model, batch, draw(model, batch))


def make_softmask_pp(config: SoftMaskPPConfig) -> SoftMaskPP:
    """A model whose MLM reads a caption of its own, as in ALBEF."""
    text = replace(config.text, dropout=0.0, attention_dropout=0.0)
    model = SoftMaskPP(replace(config, mask_text="mlm", text=text), special_ids=BERT)
    with torch.no_grad():
        for queue in (model.contrast.image_queue, model.contrast.text_queue):
            queue.copy_(torch.nn.functional.normalize(torch.randn_like(queue), dim=-1))
        model.itm_head.weight.mul_(10.0)  # so that matches depend on the image
        for parameter in model.momentum_encoder.parameters():
            parameter.add_(0.1 * parameter.std(correction=0) * torch.randn_like(parameter))
    return model.train()


def caption_lengths(size: int) -> Tensor:
    """[size] caption lengths, distributed as CC3M's: 11 tokens on average between CLS and SEP, LONGEST at most with
    them."""
    drawn = torch.distributions.Gamma(torch.tensor(6.0), torch.tensor(0.55)).sample((size,))
    return (drawn.round().long() + 2).clamp(4, LONGEST)


def make_batch(model: SoftMaskPP | SyCoCa, size: int, *, spare: int = 0) -> Batch:
    """Captions padded to the longest, with `spare` more columns."""
    lengths = caption_lengths(size)
    position = torch.arange(int(lengths.max()) + spare)
    mask = position < lengths[:, None]
    ids = torch.randint(BERT.mask + 1, model.config.text.vocab_size, mask.shape)
    ids[:, 0] = BERT.cls
    ids.scatter_(1, lengths[:, None] - 1, BERT.sep)
    words = torch.where(mask & (position > 0) & (position < lengths[:, None] - 1), position - 1, -1)
    images = torch.randn(size, 3, *[model.config.vision.image_size] * 2)
    return Batch(images, ids.masked_fill(~mask, BERT.pad), mask, words, torch.arange(size))


def draw(model: SoftMaskPP, batch: Batch) -> Draws:
    """Masked tokens as in training; words of one token, and other pairs' captions and images, drawn uniformly."""
    masked = mask_tokens(batch.input_ids, BERT, vocab_size=model.config.text.vocab_size, probability=MASKED)
    size, real = len(batch.images), batch.attention_mask.sum(1)
    own = torch.arange(size)
    hard_text, hard_image = ((own + torch.randint(1, size, (size,))) % size for _ in range(2))
    word = 1 + (torch.rand(size) * (real - 2)).long()
    return Draws(masked=masked, hard_text=hard_text, hard_image=hard_image, word_index=word[:, None])
