"""BERT as ALBEF uses it: text layers, then fusion layers whose cross-attention reads image tokens.

The image's keys and values are projected once per layer and image, without bias (the key's bias drops out of the
softmax, the value's is added by the op), so that all pairs of one image, soft-masked ones too, share them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from softmask import ops

from .attention import attend
from .config import TextConfig


def split_heads(states: Tensor, heads: int) -> Tensor:
    """[B, T, D] -> [B, H, T, E], a view."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(states: Tensor) -> Tensor:
    """[B, H, T, E] -> [B, T, D]."""
    return states.transpose(1, 2).flatten(2)


def at_least_fp32(values: Tensor) -> Tensor:
    """Half precision (autocast's outputs) to fp32; fp32 and fp64 as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


@dataclass
class ImageKeys:
    """One fusion layer's keys and values of all images, [B, H, P, E], projected without bias."""

    key: Tensor
    value: Tensor


@dataclass
class PairIndex:
    """Which image each pair reads (`kv_index` [N]) and how much of each of its tokens (`key_weight` [N, P])."""

    kv_index: Tensor | None = None
    key_weight: Tensor | None = None


@dataclass
class CrossRecord:
    """What a word's map needs of one cross-attention: query and output [N, H, T, E], the bias [H, E] of its values."""

    query: Tensor
    output: Tensor
    value_bias: Tensor


class Embeddings(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.max_positions, config.width)
        self.token_type = nn.Embedding(2, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        if length > self.position.num_embeddings:
            raise ValueError(
                f"input_ids: expected at most text.max_positions = {self.position.num_embeddings} tokens, got {length}"
            )
        constant = self.position.weight[:length] + self.token_type.weight[0]
        return self.dropout(self.norm(self.word(input_ids) + constant))


class SelfAttention(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)
        self.output = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.attention_dropout, self.library = config.attention_dropout, config.attention

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        query, key, value = (split_heads(f(states), self.heads) for f in (self.query, self.key, self.value))
        dropout = self.attention_dropout if self.training else 0.0
        mixed = attend(query, key, value, library=self.library, keep=attention_mask, dropout=dropout)
        return self.norm(states + self.dropout(self.output(merge_heads(mixed))))


class CrossAttention(nn.Module):
    def __init__(self, config: TextConfig, *, image_width: int) -> None:
        super().__init__()
        self.heads, self.library = config.heads, config.attention
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(image_width, config.width, bias=False)
        self.value = nn.Linear(image_width, config.width, bias=False)
        self.value_bias = nn.Parameter(torch.zeros(config.width))  # added by the op
        self.output = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def project(self, image_tokens: Tensor) -> ImageKeys:
        """image_tokens [B, P, D_image] -> keys and values [B, H, P, E]."""
        key, value = (split_heads(f(image_tokens), self.heads) for f in (self.key, self.value))
        return ImageKeys(key=key, value=value)

    def forward(self, states: Tensor, image: ImageKeys, pairs: PairIndex) -> tuple[Tensor, CrossRecord]:
        query = split_heads(self.query(states), self.heads)
        bias = self.value_bias.unflatten(0, (self.heads, -1))  # [H, E]
        mixed = self._mix(query, image, pairs, bias)
        if torch.is_grad_enabled() and not mixed.requires_grad:
            mixed.requires_grad_()  # frozen weights: the map still needs a gradient from here on
        states = self.norm(states + self.dropout(self.output(merge_heads(mixed))))
        return states, CrossRecord(query=query, output=mixed, value_bias=bias)

    def _mix(self, query: Tensor, image: ImageKeys, pairs: PairIndex, bias: Tensor) -> Tensor:
        if self.library == "sdpa" or pairs.key_weight is not None:
            return ops.soft_mask_attention(
                query,
                image.key,
                image.value,
                key_weight=pairs.key_weight,
                kv_index=pairs.kv_index,
                value_bias=bias,
            )
        key, value = image.key, image.value
        if pairs.kv_index is not None:
            key, value = key.index_select(0, pairs.kv_index), value.index_select(0, pairs.kv_index)
        return attend(query, key, value, library=self.library) + bias[:, None].to(value.dtype)


class FeedForward(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states: Tensor) -> Tensor:
        return self.norm(states + self.dropout(self.down(F.gelu(self.up(states)))))


class TextLayer(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        return self.feed_forward(self.self_attention(states, attention_mask))


class FusionLayer(nn.Module):
    """Self-attention over the text, cross-attention to the image, feed-forward; post-norm, as in BERT."""

    def __init__(self, config: TextConfig, *, image_width: int) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config)
        self.cross_attention = CrossAttention(config, image_width=image_width)
        self.feed_forward = FeedForward(config)

    def forward(
        self, states: Tensor, attention_mask: Tensor, image: ImageKeys | None, pairs: PairIndex
    ) -> tuple[Tensor, CrossRecord | None]:
        states = self.self_attention(states, attention_mask)
        record = None
        if image is not None:
            states, record = self.cross_attention(states, image, pairs)
        return self.feed_forward(states), record


class TextEncoder(nn.Module):
    """input_ids [B, T], attention_mask [B, T] (True = real) -> states [B, T, D]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.text_layers))
        self.activation_checkpointing = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.embeddings(input_ids)
        for layer in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                states = checkpoint(layer, states, attention_mask, use_reentrant=False)
            else:
                states = layer(states, attention_mask)
        return states


class FusionEncoder(nn.Module):
    """States [N, T, D] of N captions, read together with the images that `pairs` names -> [N, T, D]."""

    def __init__(self, config: TextConfig, *, image_width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FusionLayer(config, image_width=image_width) for _ in range(config.fusion_layers))
        self.activation_checkpointing = False

    def project(self, image_tokens: Tensor) -> list[ImageKeys]:
        """Keys and values of every layer, once for all pairs of these images."""
        return [layer.cross_attention.project(image_tokens) for layer in self.layers]

    def forward(
        self,
        states: Tensor,
        attention_mask: Tensor,
        images: list[ImageKeys] | None,
        pairs: PairIndex | None = None,
        *,
        record_layer: int | None = None,
    ) -> tuple[Tensor, CrossRecord | None]:
        """`images=None` leaves the cross-attention out (plain BERT). `record_layer`: the layer whose query and
        attention output are returned, for `ops.word_attention`."""
        pairs = pairs or PairIndex()
        recorded = None
        for number, layer in enumerate(self.layers):
            arguments = (states, attention_mask, images[number] if images is not None else None, pairs)
            if self.activation_checkpointing and torch.is_grad_enabled() and number != record_layer:
                states, _ = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                states, record = layer(*arguments)
                recorded = record if number == record_layer else recorded
        return states, recorded


class MLMHead(nn.Module):
    """states [M, D] -> logits [M, vocabulary]; the decoder's weight is the word embedding's.

    It comes as a module: at ZeRO stage 3 DeepSpeed fetches a weight for the module in whose forward it is looked up.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, states: Tensor, word_embedding: nn.Embedding) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(states))), word_embedding.weight, self.bias)


def initialize(module: nn.Module, *, std: float) -> None:
    """BERT's initialization of a module and all within it: normal weights of linear and embedding layers, no bias."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
