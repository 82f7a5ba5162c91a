"""CoCa's attentional pooler: learned queries that attend to an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from softmask.models.layers.attention import attend
from softmask.models.layers.packing import Packing


class AttentionalPooler(nn.Module):
    """``norm(output(attention(norm(queries), norm(tokens))))``: image tokens [B, P, D] -> [B, 1 + queries, D]. The
    first output is for the contrastive loss, the others for the caption decoder.

    Raises:
        ValueError: the width D is not a multiple of the number of heads.

    Source: CoCa (arXiv 2205.01917), as in open_clip.
    """

    def __init__(self, width: int, heads: int, *, queries: int, library: str = "sdpa") -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"pooler_heads: expected a divisor of the image encoder's width {width}, got {heads}")
        self.heads, self.library = heads, library
        self.queries = nn.Parameter(torch.randn(1 + queries, width))  # normalized: their length does not matter
        self.query_norm = nn.LayerNorm(width)
        self.source_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        rows, length, _ = tokens.shape
        source = self.source_norm(tokens).flatten(0, 1)
        query, key, value = (
            x.unflatten(-1, (self.heads, -1))
            for x in (self.query(self.query_norm(self.queries)), self.key(source), self.value(source))
        )
        count = len(query)
        queries, keys = (Packing.full(rows, n, tokens.device) for n in (count, length))
        query = query.expand(rows, -1, -1, -1).flatten(0, 1)  # the same for all images
        mixed = attend(query, key, value, library=self.library, queries=queries, keys=keys)
        return self.norm(self.output(mixed.flatten(1))).unflatten(0, (rows, count))

    def each(self, tokens: Tensor) -> Tensor:
        """[B, P, D] -> [B, P, D]: the output, the same for every query, if each token were the whole image."""
        return self.norm(self.output(self.value(self.source_norm(tokens))))
