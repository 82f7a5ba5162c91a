"""Captions for images by SyCoCa: greedy, by beam search or by nucleus sampling, through transformers' generation.

Every step feeds the last token alone: keys and values of the caption's earlier tokens come from transformers' cache,
those of the image are made once. Attention of single tokens is PyTorch's, whatever `text.attention` names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from softmask.models.layers.transformer import Attention, Block
from softmask.models.sycoca.model import SyCoCa


@dataclass(frozen=True)
class Beams:
    """The N captions of each image that a beam search ends with, the best by the mean of its tokens first."""

    captions: Tensor  # [B, N, T] token ids, as of `generate_captions`
    log_prob: Tensor  # [B, N] of the caption given the image; cut at max_length: of what there is
    similarity: Tensor  # [B, N] logit_scale * <image feature, text feature>

    def best(self) -> Tensor:
        """[B, T], the caption with the largest log_prob + similarity: what both heads agree on."""
        best = (self.log_prob + self.similarity).argmax(dim=1)
        return self.captions[torch.arange(len(best), device=best.device), best]


@torch.no_grad()
def generate_captions(
    model: SyCoCa,
    images: Tensor,
    *,
    max_length: int,
    num_beams: int = 1,
    top_p: float | None = None,
    rerank: bool = False,
) -> Tensor:
    """images [B, 3, S, S] -> token ids [B, T <= max_length] from [CLS] to [SEP], [PAD] behind.

    The likeliest token each time; with `num_beams` > 1 beam search, by the mean log-probability of a token; with
    `top_p` a draw from the likeliest tokens that together have that probability, by torch's random numbers; with both
    transformers' beams of draws.

    With `rerank` both heads choose among the beams: the caption with the largest

        log p(caption | image) + logit_scale * <image feature, text feature>;

    of one beam there is nothing to choose.

    Raises:
        ValueError: no image; max_length is not from 2 to text.max_positions, num_beams < 1, top_p is not in (0, 1],
            or given with rerank.
    """
    _check(model, images, max_length=max_length, num_beams=num_beams)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
    if rerank and top_p is not None:
        raise ValueError(f"rerank: expected beams, not draws, got top_p {top_p}")
    if rerank and num_beams > 1:
        beams = search_captions(model, images, max_length=max_length, num_beams=num_beams)
        return _padded(model, beams.best())
    options = {"do_sample": top_p is not None, "top_p": top_p, "top_k": None if top_p is None else 0}
    with evaluating(model):
        _, tokens = model.pool(model.vision(images))
        found = _generate(model, tokens, max_length=max_length, num_beams=num_beams, **options)
    return _padded(model, found.sequences)


@torch.no_grad()
def search_captions(model: SyCoCa, images: Tensor, *, max_length: int, num_beams: int) -> Beams:
    """images [B, 3, S, S] -> all captions of beam search, with what either head thinks of them.

    Raises:
        ValueError: no image; max_length is not from 2 to text.max_positions, or num_beams < 2.
    """
    _check(model, images, max_length=max_length, num_beams=num_beams, fewest=2)
    with evaluating(model):
        pooled, tokens = model.pool(model.vision(images))
        options = {"num_return_sequences": num_beams, "output_scores": True}
        found = _generate(model, tokens, max_length=max_length, num_beams=num_beams, **options)
        captions = _padded(model, found.sequences)
        mask = _up_to(model.special_ids.sep, captions)
        _, texts = model.encode_text(captions, mask)
        image = model.image_feature(pooled)
        similarity = model.scale() * torch.einsum("bd,bnd->bn", image, texts.unflatten(0, (len(images), -1)))
    log_prob = found.sequences_scores * (mask.sum(dim=1) - 1)  # transformers' is the mean over those behind [CLS]
    return Beams(captions.unflatten(0, similarity.shape), log_prob.view(similarity.shape), similarity)


def _check(model: SyCoCa, images: Tensor, *, max_length: int, num_beams: int, fewest: int = 1) -> None:
    most = model.config.text.max_positions
    if not 2 <= max_length <= most:
        raise ValueError(f"max_length: expected 2 to text.max_positions = {most}, got {max_length}")
    if num_beams < fewest:
        raise ValueError(f"num_beams: expected at least {fewest}, got {num_beams}")
    if len(images) == 0:
        raise ValueError(f"images: expected at least one image [B, 3, S, S], got shape {list(images.shape)}")


def _generate(model: SyCoCa, tokens: Tensor, **options: object) -> ModelOutput:
    """transformers' generation from image tokens [B, P, D]."""
    special, generator = model.special_ids, CaptionGenerator(model)
    config = GenerationConfig(
        bos_token_id=special.cls,
        eos_token_id=special.sep,
        pad_token_id=special.pad,
        return_dict_in_generate=True,
        **options,
    )
    start = torch.full((len(tokens), 1), special.cls, device=tokens.device)
    return generator.generate(start, generation_config=config, images=generator.read(tokens))


def _up_to(token: int, captions: Tensor) -> Tensor:
    """Which of captions [N, T] stand up to the first `token`, bool [N, T]; all where there is none."""
    ends = captions == token
    return ends.cumsum(dim=1) - ends.long() == 0


def _padded(model: SyCoCa, captions: Tensor) -> Tensor:
    """captions [N, T] with [PAD] behind [SEP], where transformers writes [SEP] if [PAD] is 0; T of the longest."""
    mask = _up_to(model.special_ids.sep, captions)
    return captions.where(mask, model.special_ids.pad)[:, mask.any(dim=0)]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model that is in training does not change by what is read meanwhile, nor does a batch change its captions."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


class CaptionGenerator(PreTrainedModel, GenerationMixin):
    """SyCoCa's text encoder and caption decoder as transformers' generation asks for them."""

    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, model: SyCoCa) -> None:
        text = model.config.text
        super().__init__(
            PretrainedConfig(num_hidden_layers=text.layers + text.decoder_layers, vocab_size=text.vocab_size)
        )
        self.sycoca = model

    def read(self, tokens: Tensor) -> Tensor:
        """The image tokens [B, P, D] -> keys and values of the decoder's layers, [B, layers, 2, H, P, E]."""
        layers = []
        for block in self.sycoca.caption_decoder.cross:
            attention = block.attention
            told = attention.source_norm(tokens)
            layers.append(torch.stack([_heads(attention, part(told)) for part in (attention.key, attention.value)], 1))
        return torch.stack(layers, 1)

    def forward(
        self, input_ids: Tensor, images: Tensor, past_key_values: Cache, **_unused: object
    ) -> CausalLMOutputWithPast:
        """The logits [B, 1, V] behind input_ids [B, T], which follow what the cache holds."""
        text, decoder = self.sycoca.text, self.sycoca.caption_decoder
        past = past_key_values.get_seq_length()
        position = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
        states = text.word(input_ids) + text.position(position)  # [B, T, D]
        for layer, block in enumerate(text.blocks):
            states = _look_back(block, states, past_key_values, layer)
        states = text.told(states)
        for layer, (own, cross) in enumerate(zip(decoder.own, decoder.cross, strict=True)):
            states = _look_back(own, states, past_key_values, len(text.blocks) + layer)
            states = _look_at(cross, states, *images[:, layer].unbind(1))
        logits = self.sycoca.caption_head(decoder.norm(states[:, -1:]))
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


def _heads(attention: Attention, states: Tensor) -> Tensor:
    """[B, T, D] -> [B, H, T, E]."""
    return states.unflatten(-1, (attention.heads, -1)).transpose(1, 2)


def _look_back(block: Block, states: Tensor, cache: Cache, layer: int) -> Tensor:
    """A block of self-attention; tokens see those in the cache, themselves, and those before them."""
    attention, first = block.attention, cache.get_seq_length(layer) == 0
    told = attention.norm(states)
    query, key, value = (_heads(attention, f(told)) for f in (attention.query, attention.key, attention.value))
    key, value = cache.update(key, value, layer)
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=first)
    return _out(block, states, mixed)


def _look_at(block: Block, states: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A block of attention to the image, key, value [B, H, P, E]."""
    attention = block.attention
    query = _heads(attention, attention.query(attention.norm(states)))
    return _out(block, states, F.scaled_dot_product_attention(query, key, value))


def _out(block: Block, states: Tensor, mixed: Tensor) -> Tensor:
    return block.feed_forward(states + block.attention.output(mixed.transpose(1, 2).flatten(2)))
