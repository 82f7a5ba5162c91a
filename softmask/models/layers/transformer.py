"""Pre-norm transformer blocks over packed sequences, for SyCoCa's text encoder and both decoders."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmask.models.layers.attention import attend
from softmask.models.layers.packing import OutputPositions, Packing
from softmask.models.layers.recomputation import checkpointed


class Attention(nn.Module):
    """``x + output(attention(norm(x), norm(source)))``; x [S, D] packed, source [S', D'] packed or, for self-attention,
    None. With `outputs`, of those tokens alone: [M, D]."""

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
        outputs: OutputPositions | None = None,
    ) -> Tensor:
        asking = self.norm(states)
        told = asking if source is None else self.source_norm(source)
        told_packing = packing if source is None else source_packing
        if outputs is not None:
            states, asking = states.index_select(0, outputs.index), asking.index_select(0, outputs.index)
            packing = outputs.packing
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
        outputs: OutputPositions | None = None,
    ) -> Tensor:
        options = {"causal": causal, "outputs": outputs}
        return self.feed_forward(self.attention(states, packing, source, source_packing, **options))


class CrossDecoder(nn.Module):
    """Blocks that attend to themselves and blocks that attend to a source in turn, `layers` of each, and a last norm.

    states [S, D] and source [S', D'], packed as captions or as images -> [S, D], or [M, D] of `outputs`,
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

    def initialize_as_open_clip(self) -> None:
        width = self.norm.normalized_shape[0]
        initialize_by_depth([*self.own, *self.cross], width=width, layers=len(self.own))

    def forward(
        self,
        states: Tensor,
        packing: Packing,
        source: Tensor,
        source_packing: Packing,
        *,
        outputs: OutputPositions | None = None,
    ) -> Tensor:
        recompute = self.activation_checkpointing
        for number, (own, cross) in enumerate(zip(self.own, self.cross, strict=True)):
            last = outputs if number == len(self.own) - 1 else None
            states = checkpointed(own, states, packing, None, None, self.causal, last, recompute=recompute)
            packing = packing if last is None else last.packing
            states = checkpointed(cross, states, packing, source, source_packing, recompute=recompute)
        return self.norm(states)


def initialize_by_depth(blocks: Iterable[Block], *, width: int, layers: int) -> None:
    """open_clip's weights: normal, of queries, keys and values with standard deviation width^-1/2, of what a block adds
    to its input (2 * width * layers)^-1/2, of the feed-forward's first layer (2 * width)^-1/2."""
    within, added = width**-0.5, (2 * width * layers) ** -0.5
    for block in blocks:
        attention, feed_forward = block.attention, block.feed_forward
        for layer in (attention.query, attention.key, attention.value):
            nn.init.normal_(layer.weight, std=within)
        nn.init.normal_(feed_forward.up.weight, std=(2 * width) ** -0.5)
        for layer in (attention.output, feed_forward.down):
            nn.init.normal_(layer.weight, std=added)


class CausalTextEncoder(nn.Module):
    """input_ids [B, T], whose real tokens the packing names -> tokens [S, D] and CLS [B, D].

    A learned CLS stands behind every caption and sees all of it; no token sees what follows it. By `open_clip` its
    position is the last one whatever the caption's length, and it alone is normalized.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        heads: int,
        layers: int,
        max_positions: int,
        library: str,
        open_clip: bool = False,
    ) -> None:
        super().__init__()
        self.open_clip = open_clip
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
            states = checkpointed(block, states, with_cls, None, None, True, recompute=self.activation_checkpointing)
        padded = with_cls.pad(self.told(states))
        tokens, cls = packing.pack(padded[:, :-1]), padded[:, -1]
        return tokens, self.norm(cls) if self.open_clip else cls

    def told(self, states: Tensor) -> Tensor:
        """States of the last block -> tokens as decoders read them."""
        return states if self.open_clip else self.norm(states)

    def normalized(self, tokens: Tensor) -> Tensor:
        """Tokens as CLS is when it is projected."""
        return self.norm(tokens) if self.open_clip else tokens

    def _positions(self, packing: Packing) -> Tensor:
        """[B, T + 1] position in the caption; CLS comes last."""
        position = torch.arange(packing.length, device=packing.mask.device).expand(len(packing.mask), -1)
        lengths = packing.mask.sum(1, keepdim=True)
        last = torch.full_like(lengths, self.position.num_embeddings - 1) if self.open_clip else lengths
        return torch.cat([position, last], dim=1)
