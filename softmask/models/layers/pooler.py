"""CoCa's attentional pooler: learned queries that read an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from softmask.models.layers.attention import attend
from softmask.models.layers.packing import Packing


class AttentionalPooler(nn.Module):
    """``norm(output(attention(norm(queries), norm(tokens))))``: image tokens [B, P, D] -> [B, 1 + queries, D]: the
    first for the contrastive loss, the others for the caption's decoder.

    Raises:
        ValueError: the width D is no multiple of the number of heads.

    Source: CoCa (arXiv 2205.01917), as in open_clip.
    """

    def __init__(self, width: int, heads: int, *, queries: int, library: str = "sdpa") -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"pooler_heads: expected a divisor of the image encoder's width {width}, got {heads}")
        self.heads, self.library = heads, library
        self.queries = nn.Parameter(torch.randn(1 + queries, width))  # their length is nothing: they are normalized
        self.query_norm = nn.LayerNorm(width)
        self.source_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        rows, length, _ = tokens.shape
        told = self.source_norm(tokens).flatten(0, 1)
        query, key, value = (
            x.unflatten(-1, (self.heads, -1))
            for x in (self.query(self.query_norm(self.queries)), self.key(told), self.value(told))
        )
        asked = len(query)
        packings = {name: Packing.full(rows, n, tokens.device) for name, n in (("queries", asked), ("keys", length))}
        every = query.expand(rows, -1, -1, -1).flatten(0, 1)  # the same for all images
        mixed = attend(every, key, value, library=self.library, **packings)
        return self.norm(self.output(mixed.flatten(1))).unflatten(0, (rows, asked))

    def each(self, tokens: Tensor) -> Tensor:
        """[B, P, D] -> [B, P, D]: what every query would give of an image of this one token."""
        return self.norm(self.output(self.value(self.source_norm(tokens))))
