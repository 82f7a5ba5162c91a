"""Pre-norm transformer blocks over packed sequences, for SyCoCa's text encoder and both decoders."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend
from .packing import Packing, Wanted
from .running import run


class Attention(nn.Module):
    """``x + output(attention(norm(x), norm(source)))``; x [S, D] packed, source [S', D'] packed or, for self-attention,
    None. Of what is `wanted` alone, [M, D]."""

    def __init__(self, width: int, heads: int, *, source_width: int | None = None, library: str = "sdpa") -> None:
        super().__init__()
        self.heads, self.library = heads, library
        self.norm = nn.LayerNorm(width)
        self.source_norm = None if source_width is None else nn.LayerNorm(source_width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width or width, width)
        self.value = nn.Linear(source_width or width, width)
        self.output = nn.Linear(width, width)

    def forward(
        self,
        states: Tensor,
        packing: Packing,
        source: Tensor | None = None,
        source_packing: Packing | None = None,
        *,
        causal: bool = False,
        wanted: Wanted | None = None,
    ) -> Tensor:
        asking = self.norm(states)
        told = asking if source is None else self.source_norm(source)
        told_packing = packing if source is None else source_packing
        if wanted is not None:
            states, asking = states.index_select(0, wanted.index), asking.index_select(0, wanted.index)
            packing = wanted.packing
        inputs = ((self.query, asking), (self.key, told), (self.value, told))
        by_head = (f(x).unflatten(-1, (self.heads, -1)) for f, x in inputs)
        mixed = attend(*by_head, library=self.library, causal=causal, queries=packing, keys=told_packing)
        return states + self.output(mixed.flatten(1))


class FeedForward(nn.Module):
    def __init__(self, width: int, *, ratio: float = 4.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, int(ratio * width))
        self.down = nn.Linear(int(ratio * width), width)

    def forward(self, states: Tensor) -> Tensor:
        return states + self.down(F.gelu(self.up(self.norm(states))))


class Block(nn.Module):
    """Attention to oneself or, with `source_width`, to a source, and a feed-forward."""

    def __init__(self, width: int, heads: int, *, source_width: int | None = None, library: str = "sdpa") -> None:
        super().__init__()
        self.attention = Attention(width, heads, source_width=source_width, library=library)
        self.feed_forward = FeedForward(width)

    def forward(
        self,
        states: Tensor,
        packing: Packing,
        source: Tensor | None = None,
        source_packing: Packing | None = None,
        causal: bool = False,
        wanted: Wanted | None = None,
    ) -> Tensor:
        options = {"causal": causal, "wanted": wanted}
        return self.feed_forward(self.attention(states, packing, source, source_packing, **options))


class CrossDecoder(nn.Module):
    """Blocks that attend to themselves and blocks that attend to a source in turn, `layers` of each, and a last norm.

    states [S, D] and source [S', D'], packed as captions or as pictures -> [S, D], or [M, D] of those that are wanted,
    the others left out of the last layer; not of causal decoders.
    """

    def __init__(
        self, width: int, heads: int, layers: int, *, source_width: int, causal: bool, library: str = "sdpa"
    ) -> None:
        super().__init__()
        self.causal = causal
        self.own = nn.ModuleList(Block(width, heads, library=library) for _ in range(layers))
        self.cross = nn.ModuleList(
            Block(width, heads, source_width=source_width, library=library) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.activation_checkpointing = False

    def forward(
        self,
        states: Tensor,
        packing: Packing,
        source: Tensor,
        source_packing: Packing,
        *,
        wanted: Wanted | None = None,
    ) -> Tensor:
        again = self.activation_checkpointing
        for number, (own, cross) in enumerate(zip(self.own, self.cross, strict=True)):
            last = wanted if number == len(self.own) - 1 else None
            states = run(own, states, packing, None, None, self.causal, last, again=again)
            packing = packing if last is None else last.packing
            states = run(cross, states, packing, source, source_packing, again=again)
        return self.norm(states)


class CausalTextEncoder(nn.Module):
    """input_ids [B, T], whose real tokens the packing names -> tokens [S, D] and CLS [B, D].

    A learned CLS stands behind every caption and sees all of it; no token sees what follows it.
    """

    def __init__(
        self, *, vocab_size: int, width: int, heads: int, layers: int, max_positions: int, library: str
    ) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(max_positions + 1, width)
        self.cls = nn.Parameter(torch.empty(width).normal_(std=0.01))
        self.blocks = nn.ModuleList(Block(width, heads, library=library) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.activation_checkpointing = False

    def no_weight_decay(self) -> set[str]:
        return {"position.weight"}

    def forward(self, input_ids: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        rows, length = input_ids.shape
        most = self.position.num_embeddings - 1
        if length > most:
            raise ValueError(f"input_ids: expected at most text.max_positions = {most} tokens, got {length}")
        words = packing.pad(self.word(packing.pack(input_ids)))  # [B, T, D]
        padded = torch.cat([words, self.cls.to(words.dtype).expand(rows, 1, -1)], dim=1)
        with_cls = packing.with_column(rows)
        states = with_cls.pack(padded) + self.position(with_cls.pack(self._positions(packing)))
        for block in self.blocks:
            states = run(block, states, with_cls, None, None, True, again=self.activation_checkpointing)
        padded = with_cls.pad(self.norm(states))
        return packing.pack(padded[:, :-1]), padded[:, -1]

    @staticmethod
    def _positions(packing: Packing) -> Tensor:
        """[B, T + 1] position in the caption; CLS comes right behind its last token."""
        position = torch.arange(packing.length, device=packing.mask.device).expand(len(packing.mask), -1)
        return torch.cat([position, packing.mask.sum(1, keepdim=True)], dim=1)
