"""BERT's fusion layers, with cross-attention to image tokens. Captions are packed, images shared between pairs.

An image's keys and values are projected once per layer for all the pairs that read it, soft-masked or not. They have no
bias: the key's drops out of the softmax, and the op adds the value's. The first layer's self-attention is computed once
per caption; the last layer computes only the states that are read. Texts that read two pictures (NLVR2) have two layers
for each of BERT's, one for either picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softmask import ops
from softmask.models.config import TextConfig
from softmask.models.layers.attention import attend
from softmask.models.layers.bert import FeedForward, SelfAttention
from softmask.models.layers.modules import Modules
from softmask.models.layers.packing import OutputPositions, Packing
from softmask.models.layers.recomputation import checkpointed
from softmask.ranges import named_range


@dataclass
class ImageKeys:
    """One fusion layer's keys and values of all images, [B, H, P, E], projected without bias."""

    key: Tensor
    value: Tensor

    def detach(self) -> ImageKeys:
        return ImageKeys(self.key.detach(), self.value.detach())

    def take(self, rows: Tensor) -> ImageKeys:
        """Those of the images rows [M], which may repeat."""
        return ImageKeys(self.key.index_select(0, rows), self.value.index_select(0, rows))


@dataclass
class PairIndex:
    """Which image each pair reads (`kv_index` [N]) and the weights of its tokens (`key_weight` [N, P])."""

    kv_index: Tensor | None = None
    key_weight: Tensor | None = None
    key_padding_mask: Tensor | None = None  # [B, P] bool, True: not a token; for keys of texts instead of images


@dataclass
class CrossRecord:
    """One cross-attention as word maps need it: query and output [N, H, T, E], the values' bias [H, E]."""

    query: Tensor
    output: Tensor
    value_bias: Tensor


@dataclass
class FusionStart:
    """Captions at the first cross-attention: packed states and query [S, D]."""

    states: Tensor
    query: Tensor
    packing: Packing

    def take(self, rows: Tensor, size: int) -> FusionStart:
        """The captions rows [M], with `size` tokens in all; rows may repeat."""
        packing, index = self.packing.take(rows, size)
        return FusionStart(self.states.index_select(0, index), self.query.index_select(0, index), packing)

    def detach(self) -> FusionStart:
        return FusionStart(self.states.detach(), self.query.detach(), self.packing)


class CrossAttention(nn.Module):
    """With `projects` False it has no projections of its own and reads another layer's keys and values."""

    def __init__(self, config: TextConfig, *, image_width: int, projects: bool = True) -> None:
        super().__init__()
        self.heads, self.library = config.heads, config.attention
        self.query = nn.Linear(config.width, config.width)
        if projects:
            self.key = nn.Linear(image_width, config.width, bias=False)
            self.value = nn.Linear(image_width, config.width, bias=False)
        self.value_bias = nn.Parameter(torch.zeros(config.width))  # added by the op
        self.output = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def project(self, image_tokens: Tensor) -> ImageKeys:
        """image_tokens [B, P, D_image] -> keys and values [B, H, P, E]."""
        by_head = (f(image_tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.key, self.value))
        key, value = by_head
        return ImageKeys(key, value)

    def forward(
        self, states: Tensor, query: Tensor, packing: Packing, image: ImageKeys, pairs: PairIndex
    ) -> tuple[Tensor, CrossRecord]:
        """states and query [S, D] -> states [S, D]."""
        by_head = packing.pad(query.unflatten(-1, (self.heads, -1))).transpose(1, 2)  # [N, H, T, E]
        bias = self.value_bias.unflatten(0, (self.heads, -1))  # [H, E]
        mixed = self._mix(by_head, image, pairs, bias, packing)
        if torch.is_grad_enabled() and not mixed.requires_grad:
            mixed.requires_grad_()  # with frozen weights the map still needs the gradient
        record = CrossRecord(query=by_head, output=mixed, value_bias=bias)
        mixed = packing.pack(mixed.transpose(1, 2)).flatten(1)
        return self.norm(states + self.dropout(self.output(mixed))), record

    def _mix(self, query: Tensor, image: ImageKeys, pairs: PairIndex, bias: Tensor, packing: Packing) -> Tensor:
        if self.library == "sdpa" or pairs.key_weight is not None or pairs.key_padding_mask is not None:
            return ops.soft_mask_attention(
                query,
                image.key,
                image.value,
                key_weight=pairs.key_weight,
                kv_index=pairs.kv_index,
                value_bias=bias,
                key_padding_mask=pairs.key_padding_mask,
            )
        key, value = (x.transpose(1, 2) for x in (image.key, image.value))
        if pairs.kv_index is not None:
            key, value = key.index_select(0, pairs.kv_index), value.index_select(0, pairs.kv_index)
        rows, length = key.shape[:2]
        mixed = attend(
            packing.pack(query.transpose(1, 2)),
            key.flatten(0, 1),
            value.flatten(0, 1),
            library=self.library,
            queries=packing,
            keys=Packing.full(rows, length, key.device),
        )
        return packing.pad(mixed + bias.to(value.dtype)).transpose(1, 2)


class FusionLayer(nn.Module):
    """Self-attention over the text, cross-attention to the image, feed-forward; post-norm, as in BERT. `causal`: no
    token sees a later one."""

    def __init__(self, config: TextConfig, *, image_width: int, projects: bool = True, causal: bool = False) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config, causal=causal)
        self.cross_attention = CrossAttention(config, image_width=image_width, projects=projects)
        self.feed_forward = FeedForward(config)

    def start(self, states: Tensor, packing: Packing, outputs: OutputPositions | None = None) -> FusionStart:
        """Everything before the cross-attention, for all tokens or those of `outputs`."""
        states = self.self_attention(states, packing, outputs)
        return FusionStart(states, self.cross_attention.query(states), packing if outputs is None else outputs.packing)

    def finish(self, start: FusionStart, image: ImageKeys, pairs: PairIndex) -> tuple[Tensor, CrossRecord]:
        states, record = self.cross_attention(start.states, start.query, start.packing, image, pairs)
        return self.feed_forward(states), record

    def forward(
        self, states: Tensor, packing: Packing, image: ImageKeys, pairs: PairIndex, outputs: OutputPositions | None
    ) -> tuple[Tensor, CrossRecord]:
        return self.finish(self.start(states, packing, outputs), image, pairs)


class FusionEncoder(nn.Module):
    """Captions with the images that `pairs` names: FusionStart -> states [S, D] or [M, D].

    With `copies` above 1 there are as many layers for each of BERT's, which read the images of several `pairs` in turn
    and share their projections of keys and values.
    """

    def __init__(self, config: TextConfig, *, image_width: int, copies: int = 1, causal: bool = False) -> None:
        super().__init__()
        self.copies = copies
        self.layers = Modules[FusionLayer](
            FusionLayer(config, image_width=image_width, projects=not number % copies, causal=causal)
            for number in range(config.fusion_layers * copies)
        )
        self.activation_checkpointing = False

    @named_range("fusion")
    def project(self, image_tokens: Tensor) -> list[ImageKeys]:
        """Keys and values of every layer that has projections, for all pairs of these images."""
        return [layer.cross_attention.project(image_tokens) for layer in list(self.layers)[:: self.copies]]

    @named_range("fusion")
    def start(self, states: Tensor, packing: Packing) -> FusionStart:
        """states [S, D] of the text encoder -> the first layer before its cross-attention."""
        return checkpointed(self.layers.at(0).start, states, packing, recompute=self.activation_checkpointing)

    @named_range("fusion")
    def forward(
        self,
        start: FusionStart,
        images: list[ImageKeys],
        pairs: PairIndex | Sequence[PairIndex] | None = None,
        *,
        outputs: OutputPositions | None = None,
        record_layer: int | None = None,
        grad_from: int = 0,
    ) -> tuple[Tensor, CrossRecord | None]:
        """States of all tokens, or of those of `outputs`.

        `pairs`: one, or `copies` of them, for the layers in turn.
        `record_layer`: the layer whose query and attention output are returned, for `ops.word_attention`.
        `grad_from`: the first layer with a graph. The layers below it have none; those above it keep their activations
        even where activation checkpointing is on, since the graph is used at once.
        """
        turns = [pairs or PairIndex()] if isinstance(pairs, PairIndex | None) else pairs
        packing, recorded = start.packing, None
        if outputs is not None and len(self.layers) == 1:
            states, query = (x.index_select(0, outputs.index) for x in (start.states, start.query))
            start = FusionStart(states, query, outputs.packing)
        for number, layer in enumerate(self.layers):
            image, own_pairs = images[number // self.copies], turns[number % len(turns)]
            recompute = self.activation_checkpointing and number != record_layer and grad_from == 0
            with torch.set_grad_enabled(torch.is_grad_enabled() and number >= grad_from):
                if number == 0:
                    states, record = checkpointed(layer.finish, start, image, own_pairs, recompute=recompute)
                else:
                    last = outputs if number == len(self.layers) - 1 else None
                    states, record = checkpointed(layer, states, packing, image, own_pairs, last, recompute=recompute)
            recorded = record if number == record_layer else recorded
        return states, recorded
