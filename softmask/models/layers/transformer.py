"""Pre-norm transformer blocks over packed sequences, for SyCoCa's text encoder and both decoders."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmask.models.layers.attention import attend
from softmask.models.layers.modules import Modules
from softmask.models.layers.packing import OutputPositions, Packed, Packing
from softmask.models.layers.recomputation import checkpointed
from softmask.ranges import named_range


class Attention(nn.Module):
    """``x + output(attention(norm(x), norm(source)))``, x [S, D], source [S', D']. Without a source it is
    self-attention. With `outputs` it computes those tokens alone, [M, D]. `visible`: as for `attend`."""

    def __init__(self, width: int, heads: int, *, source_width: int | None = None, library: str = "sdpa") -> None:
        super().__init__()
        self.heads, self.library = heads, library
        self.norm = nn.LayerNorm(width)
        self.source_norm = nn.Identity() if source_width is None else nn.LayerNorm(source_width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width or width, width)
        self.value = nn.Linear(source_width or width, width)
        self.output = nn.Linear(width, width)

    def forward(
        self,
        x: Packed,
        source: Packed | None = None,
        *,
        causal: bool = False,
        outputs: OutputPositions | None = None,
        visible: Tensor | None = None,
    ) -> Packed:
        states, queries = x.tokens, x.packing
        normalized = self.norm(states)
        context = normalized if source is None else self.source_norm(source.tokens)
        keys = queries if source is None else source.packing
        if outputs is not None:
            states, normalized = states.index_select(0, outputs.index), normalized.index_select(0, outputs.index)
            queries = outputs.packing
        query, key, value = (
            projection(tokens).unflatten(-1, (self.heads, -1))  # [S, H, E]
            for projection, tokens in ((self.query, normalized), (self.key, context), (self.value, context))
        )
        how: dict[str, Any] = {"library": self.library, "causal": causal, "visible": visible}
        mixed = attend(query, key, value, queries=queries, keys=keys, **how)
        return Packed(states + self.output(mixed.flatten(1)), queries)


class FeedForward(nn.Module):
    def __init__(self, width: int, *, ratio: float = 4.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, int(ratio * width))
        self.down = nn.Linear(int(ratio * width), width)

    def forward(self, states: Tensor) -> Tensor:
        return states + self.down(F.gelu(self.up(self.norm(states))))


class Block(nn.Module):
    """Self-attention or, with `source_width`, cross-attention to a source; then a feed-forward."""

    def __init__(self, width: int, heads: int, *, source_width: int | None = None, library: str = "sdpa") -> None:
        super().__init__()
        self.attention = Attention(width, heads, source_width=source_width, library=library)
        self.feed_forward = FeedForward(width)

    def forward(
        self,
        x: Packed,
        source: Packed | None = None,
        causal: bool = False,
        outputs: OutputPositions | None = None,
        visible: Tensor | None = None,
    ) -> Packed:
        mixed = self.attention(x, source, causal=causal, outputs=outputs, visible=visible)
        return Packed(self.feed_forward(mixed.tokens), mixed.packing)


class CrossDecoder(nn.Module):
    """`layers` pairs of a self-attention block and a cross-attention block, and a last norm.

    x [S, D] and source [S', D'], packed -> states [S, D]. With `outputs`, which a causal decoder cannot have, the last
    pair computes those tokens alone: [M, D]. With `visible` [N, T, T] bool tokens see those of x that it names.
    """

    def __init__(
        self, width: int, heads: int, layers: int, *, source_width: int, causal: bool, library: str = "sdpa"
    ) -> None:
        super().__init__()
        self.causal = causal
        self.own = Modules[Block](Block(width, heads, library=library) for _ in range(layers))
        self.cross = Modules[Block](
            Block(width, heads, source_width=source_width, library=library) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.activation_checkpointing = False

    def initialize_as_open_clip(self) -> None:
        width = self.norm.normalized_shape[0]
        initialize_by_depth([*self.own, *self.cross], width=width, layers=len(self.own))

    def forward(
        self, x: Packed, source: Packed, *, outputs: OutputPositions | None = None, visible: Tensor | None = None
    ) -> Tensor:
        recompute = self.activation_checkpointing
        for number, (own, cross) in enumerate(zip(self.own, self.cross, strict=True)):
            last = outputs if number == len(self.own) - 1 else None
            x = checkpointed(own, x, None, self.causal, last, visible, recompute=recompute)
            x = checkpointed(cross, x, source, recompute=recompute)
        return self.norm(x.tokens)


def initialize_by_depth(blocks: Iterable[Block], *, width: int, layers: int) -> None:
    """open_clip's initialization: normal weights with standard deviation width^-1/2 for query, key and value,
    (2 * width * layers)^-1/2 for a block's output layers, (2 * width)^-1/2 for the feed-forward's first layer."""
    within, added = width**-0.5, (2 * width * layers) ** -0.5
    for block in blocks:
        attention, feed_forward = block.attention, block.feed_forward
        for layer in (attention.query, attention.key, attention.value):
            nn.init.normal_(layer.weight, std=within)
        nn.init.normal_(feed_forward.up.weight, std=(2 * width) ** -0.5)
        for layer in (attention.output, feed_forward.down):
            nn.init.normal_(layer.weight, std=added)


class CausalTextEncoder(nn.Module):
    """input_ids [B, T] with the packing of their real tokens -> tokens [S, D] and CLS [B, D].

    A learned CLS follows every caption and sees all of it; no token sees a later one. With `open_clip` the CLS always
    has the last position, whatever the caption's length, and only it is normalized.
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
        self.blocks = Modules[Block](Block(width, heads, library=library) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.activation_checkpointing = False

    def no_weight_decay(self) -> set[str]:
        return {"position.weight"}

    @named_range("text encoder")
    def forward(self, input_ids: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        rows, length = input_ids.shape
        most = self.position.num_embeddings - 1
        if length > most:
            raise ValueError(f"input_ids: expected at most text.max_positions = {most} tokens, got {length}")
        words = packing.pad(self.word(packing.pack(input_ids)))  # [B, T, D]
        padded = torch.cat([words, self.cls.to(words.dtype).expand(rows, 1, -1)], dim=1)
        with_cls = packing.with_column(rows)
        x = Packed(with_cls.pack(padded) + self.position(with_cls.pack(self._positions(packing))), with_cls)
        for block in self.blocks:
            x = checkpointed(block, x, None, True, recompute=self.activation_checkpointing)
        padded = with_cls.pad(self.decoder_input(x.tokens))
        tokens, cls = packing.pack(padded[:, :-1]), padded[:, -1]
        return tokens, self.norm(cls) if self.open_clip else cls

    def tokens(self, input_ids: Tensor, packing: Packing, *, position: Tensor, visible: Tensor) -> Tensor:
        """Tokens [S, D] without a CLS, at position [B, T]; each sees those that visible [B, T, T] names."""
        x = Packed(self.word(packing.pack(input_ids)) + self.position(packing.pack(position)), packing)
        for block in self.blocks:
            x = checkpointed(block, x, None, True, None, visible, recompute=self.activation_checkpointing)
        return self.decoder_input(x.tokens)

    def decoder_input(self, states: Tensor) -> Tensor:
        """The last block's states as the decoders read them."""
        return states if self.open_clip else self.norm(states)

    def normalized(self, tokens: Tensor) -> Tensor:
        """Tokens normalized as the CLS is before its projection."""
        return self.norm(tokens) if self.open_clip else tokens

    def _positions(self, packing: Packing) -> Tensor:
        """[B, T + 1] position in the caption, CLS last."""
        position = torch.arange(packing.length, device=packing.mask.device).expand(len(packing.mask), -1)
        lengths = packing.mask.sum(1, keepdim=True)
        last = torch.full_like(lengths, self.position.num_embeddings - 1) if self.open_clip else lengths
        return torch.cat([position, last], dim=1)
