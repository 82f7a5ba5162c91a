"""Captions from SyCoCa: greedy, beam search or nucleus sampling, through transformers' generation.

Every step feeds the last token alone. Keys and values of the earlier tokens come from transformers' cache; those of the
image are computed once. Single tokens use PyTorch's attention, whatever `text.attention` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from softmask.models.config import SpecialIds
from softmask.models.layers.transformer import Attention, Block
from softmask.models.sycoca.model import SyCoCa


@dataclass(frozen=True)
class Beams:
    """The N captions of each image from beam search, sorted by their mean log-probability per token."""

    captions: Tensor  # [B, N, T] token ids, as from `generate_captions`
    log_prob: Tensor  # [B, N] of the caption given the image, up to max_length
    similarity: Tensor  # [B, N] logit_scale * <image feature, text feature>

    def best(self) -> Tensor:
        """[B, T]: the caption with the largest log_prob + similarity."""
        best = (self.log_prob + self.similarity).argmax(dim=1)
        return self.captions[torch.arange(len(best), device=best.device), best]


@dataclass(frozen=True)
class Lengths:
    """Limits of generated captions, in tokens.

    Attributes:
        most: [CLS], prompt and [SEP] included.
        least: generated tokens before [SEP].
        prompt: [P] the tokens that every caption starts with, behind [CLS]. They are given and not generated: neither
            the captions nor their scores have them.
    """

    most: int
    least: int = 0
    prompt: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        given = 1 + len(self.prompt)
        if self.most < 2:
            raise ValueError(f"max_length: expected at least 2, got {self.most}")
        if given >= self.most:
            raise ValueError(f"prompt: expected fewer than {self.most - 1} tokens, got {len(self.prompt)}")
        if not 0 <= self.least <= self.most - given:
            behind = f" behind a prompt of {len(self.prompt)}" if self.prompt else ""
            expected = f"0 to {self.most - given}, as max_length = {self.most} leaves{behind}"
            raise ValueError(f"min_length: expected {expected}, got {self.least}")


@torch.no_grad()
def generate_captions(
    model: SyCoCa,
    images: Tensor,
    *,
    max_length: int,
    min_length: int = 0,
    prompt: Sequence[int] = (),
    num_beams: int = 1,
    top_p: float | None = None,
    rerank: bool = False,
) -> Tensor:
    """images [B, 3, S, S], or their tokens [B, P, D] -> token ids [B, T <= max_length] from [CLS] to [SEP], then [PAD].
    `max_length`, `min_length` and `prompt`: see `Lengths`.

    Greedy by default; with `num_beams` > 1 beam search by the mean log-probability per token; with `top_p` nucleus
    sampling from torch's random numbers; with both, beam sampling. With `rerank` the result is the beam with the
    largest

        log p(caption | image) + logit_scale * <image feature, text feature>.

    Raises:
        ValueError: no image; max_length not in [2, text.max_positions]; no room for min_length or prompt;
            num_beams < 1; top_p not in (0, 1], or given with rerank.
    """
    _check(model, images, max_length=max_length, num_beams=num_beams)
    lengths = Lengths(max_length, min_length, tuple(prompt))
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
    if rerank and top_p is not None:
        raise ValueError(f"rerank: expected beam search without top_p, got top_p {top_p}")
    if rerank and num_beams > 1:
        beams = _search(model, images, lengths, num_beams=num_beams)
        return _padded(model, beams.best())
    options = {"do_sample": top_p is not None, "top_p": top_p, "top_k": None if top_p is None else 0}
    with evaluating(model):
        _, tokens = model.backbone.pool(model.backbone.vision.tokens(images))
        captions, _ = _generate(model, tokens, lengths, num_beams=num_beams, **options)
    return _padded(model, captions)


@torch.no_grad()
def search_captions(
    model: SyCoCa,
    images: Tensor,
    *,
    max_length: int,
    min_length: int = 0,
    prompt: Sequence[int] = (),
    num_beams: int,
) -> Beams:
    """images [B, 3, S, S], or their tokens [B, P, D] -> all beams, with their log-probabilities and similarities.

    Raises:
        ValueError: no image; max_length not in [2, text.max_positions]; no room for min_length or prompt;
            num_beams < 2.
    """
    _check(model, images, max_length=max_length, num_beams=num_beams, fewest=2)
    return _search(model, images, Lengths(max_length, min_length, tuple(prompt)), num_beams=num_beams)


def _search(model: SyCoCa, images: Tensor, lengths: Lengths, *, num_beams: int) -> Beams:
    with evaluating(model):
        pooled, tokens = model.backbone.pool(model.backbone.vision.tokens(images))
        options = {"num_return_sequences": num_beams, "output_scores": True}
        found, mean = _generate(model, tokens, lengths, num_beams=num_beams, **options)
        captions = _padded(model, found)
        mask = _up_to(model.special_ids.sep, captions)
        _, texts = model.encode_text(captions, mask)
        image = model.backbone.image_feature(pooled)
        similarity = model.scale() * torch.einsum("bd,bnd->bn", image, texts.unflatten(0, (len(images), -1)))
    log_prob = mean * (mask.sum(dim=1) - 1)
    return Beams(captions.unflatten(0, similarity.shape), log_prob.view(similarity.shape), similarity)


def _check(model: SyCoCa, images: Tensor, *, max_length: int, num_beams: int, fewest: int = 1) -> None:
    most = model.config.text.max_positions
    if not 2 <= max_length <= most:
        raise ValueError(f"max_length: expected 2 to text.max_positions = {most}, got {max_length}")
    if num_beams < fewest:
        raise ValueError(f"num_beams: expected at least {fewest}, got {num_beams}")
    if len(images) == 0:
        raise ValueError(f"images: expected at least one image [B, 3, S, S], got shape {list(images.shape)}")


def _generate(model: SyCoCa, tokens: Tensor, lengths: Lengths, **options: Any) -> tuple[Tensor, Any]:
    """transformers' generation from image tokens [B, P, D]: captions [N, T] without the prompt and, of beams, the mean
    log-probability of their tokens after [CLS]."""
    special: SpecialIds = model.special_ids
    given = torch.tensor([special.cls, *lengths.prompt], device=tokens.device)
    if lengths.least:
        options["min_length"] = len(given) + lengths.least
    generator: Any = CaptionGenerator(model)  # transformers types its mixins for its own classes
    config = GenerationConfig(
        bos_token_id=special.cls,
        eos_token_id=special.sep,
        pad_token_id=special.pad,
        return_dict_in_generate=True,
        max_length=lengths.most,
        **options,
    )
    start = given.expand(len(tokens), -1)
    found = generator.generate(start, generation_config=config, images=generator.image_keys(tokens))
    captions = torch.cat([found.sequences[:, :1], found.sequences[:, len(given) :]], dim=1)
    return captions, found.get("sequences_scores")


def _up_to(token: int, captions: Tensor) -> Tensor:
    """bool [N, T]: the tokens of captions [N, T] up to and including the first `token`, or all."""
    ends = captions == token
    return ends.cumsum(dim=1) - ends.long() == 0


def _padded(model: SyCoCa, captions: Tensor) -> Tensor:
    """captions [N, T] with [PAD] after [SEP] (transformers repeats [SEP] if [PAD] is 0), cut to the longest."""
    mask = _up_to(model.special_ids.sep, captions)
    return captions.where(mask, model.special_ids.pad)[:, mask.any(dim=0)]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode: a model in training keeps its statistics, and captions do not depend on their batch."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


class CaptionGenerator(PreTrainedModel, GenerationMixin):
    """SyCoCa's text encoder and caption decoder behind the interface of transformers' generation."""

    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, model: SyCoCa) -> None:
        text = model.config.text
        sizes: dict[str, Any] = {"num_hidden_layers": text.layers + text.decoder_layers, "vocab_size": text.vocab_size}
        super().__init__(PretrainedConfig(**sizes))
        self.sycoca = model

    def image_keys(self, tokens: Tensor) -> Tensor:
        """Image tokens [B, P, D] -> keys and values of the decoder's layers, [B, layers, 2, H, P, E]."""
        layers = []
        for block in self.sycoca.caption_decoder.cross:
            attention = block.attention
            source = attention.source_norm(tokens)
            key, value = (_heads(attention, projection(source)) for projection in (attention.key, attention.value))
            layers.append(torch.stack([key, value], 1))
        return torch.stack(layers, 1)

    def forward(
        self, input_ids: Tensor, images: Tensor, past_key_values: Cache, **_unused: object
    ) -> CausalLMOutputWithPast:
        """Logits [B, 1, V] of the token after input_ids [B, T], which follow the cached tokens."""
        text, decoder = self.sycoca.backbone.text, self.sycoca.caption_decoder
        past = past_key_values.get_seq_length()
        position = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
        states = text.word(input_ids) + text.position(position)  # [B, T, D]
        for layer, block in enumerate(text.blocks):
            states = _self_attend(block, states, past_key_values, layer)
        states = text.decoder_input(states)
        for layer, (own, cross) in enumerate(zip(decoder.own, decoder.cross, strict=True)):
            states = _self_attend(own, states, past_key_values, len(text.blocks) + layer)
            states = _cross_attend(cross, states, *images[:, layer].unbind(1))
        logits = self.sycoca.caption_head(decoder.norm(states[:, -1:]))
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


def _heads(attention: Attention, states: Tensor) -> Tensor:
    """[B, T, D] -> [B, H, T, E]."""
    return states.unflatten(-1, (attention.heads, -1)).transpose(1, 2)


def _self_attend(block: Block, states: Tensor, cache: Cache, layer: int) -> Tensor:
    """A self-attention block; tokens see the cached ones, themselves and those before them."""
    attention, first = block.attention, cache.get_seq_length(layer) == 0
    x = attention.norm(states)
    query, key, value = (_heads(attention, f(x)) for f in (attention.query, attention.key, attention.value))
    key, value = cache.update(key, value, layer)
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=first)
    return _residual(block, states, mixed)


def _cross_attend(block: Block, states: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A cross-attention block, key and value [B, H, P, E]."""
    attention = block.attention
    query = _heads(attention, attention.query(attention.norm(states)))
    return _residual(block, states, F.scaled_dot_product_attention(query, key, value))


def _residual(block: Block, states: Tensor, mixed: Tensor) -> Tensor:
    return block.feed_forward(states + block.attention.output(mixed.transpose(1, 2).flatten(2)))
