"""BERT's layers over packed captions, and the text encoder. The fusion layers are in softmask_pp/fusion.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmask.models.config import TextConfig
from softmask.models.layers.attention import attend
from softmask.models.layers.modules import Modules
from softmask.models.layers.packing import OutputPositions, Packing
from softmask.models.layers.recomputation import checkpointed
from softmask.ranges import named_range


class Embeddings(nn.Module):
    """input_ids [B, T] -> states [S, D] of the packing's tokens."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.max_positions, config.width)
        self.token_type = nn.Embedding(2, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def no_weight_decay(self) -> set[str]:
        return {"position.weight"}

    def forward(self, input_ids: Tensor, packing: Packing) -> Tensor:
        length = input_ids.shape[1]
        if length > self.position.num_embeddings:
            raise ValueError(
                f"input_ids: expected at most text.max_positions = {self.position.num_embeddings} tokens, got {length}"
            )
        ids, position = packing.pack(input_ids), packing.flat_index % length
        summed = self.word(ids) + self.position(position) + self.token_type(torch.zeros_like(ids))
        return self.dropout(self.norm(summed))


class SelfAttention(nn.Module):
    """states [S, D] -> [S, D], or [M, D] with `outputs`, which a causal one cannot have."""

    def __init__(self, config: TextConfig, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = config.heads, causal
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)
        self.output = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.attention_dropout, self.library = config.attention_dropout, config.attention

    def forward(self, states: Tensor, packing: Packing, outputs: OutputPositions | None = None) -> Tensor:
        own, queries = states, packing
        if outputs is not None:
            own, queries = states.index_select(0, outputs.index), outputs.packing
        query, key, value = (
            projection(x).unflatten(-1, (self.heads, -1))  # [S, H, E]
            for projection, x in ((self.query, own), (self.key, states), (self.value, states))
        )
        dropout = self.attention_dropout if self.training else 0.0
        mixed = attend(
            query, key, value, library=self.library, queries=queries, keys=packing, causal=self.causal, dropout=dropout
        )
        return self.norm(own + self.dropout(self.output(mixed.flatten(1))))


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

    def forward(self, states: Tensor, packing: Packing) -> Tensor:
        return self.feed_forward(self.self_attention(states, packing))


class TextEncoder(nn.Module):
    """input_ids [B, T] -> states [S, D] of the packing's tokens."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.layers = Modules[TextLayer](TextLayer(config) for _ in range(config.text_layers))
        self.activation_checkpointing = False

    @named_range("text encoder")
    def forward(self, input_ids: Tensor, packing: Packing) -> Tensor:
        states = self.embeddings(input_ids, packing)
        for layer in self.layers:
            states = checkpointed(layer, states, packing, recompute=self.activation_checkpointing)
        return states


class MLMHead(nn.Module):
    """states [M, D] -> logits [M, vocabulary] by the word embedding's weight.

    The embedding is an argument, a module: at ZeRO stage 3 DeepSpeed fetches a weight for the module whose forward
    looks it up.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, states: Tensor, word_embedding: nn.Embedding) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(states))), word_embedding.weight, self.bias)
