"""Maps of words over an image, from one cross-attention of a fused pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from softmask import ops
from softmask.models.layers.numerics import at_least_fp32
from softmask.models.softmask_pp.fusion import CrossRecord, ImageKeys


@dataclass
class MapSource:
    """A score of each of N pairs, such as the logit of a match, and the cross-attention that explains it."""

    score: Tensor  # [N]
    record: CrossRecord
    image: ImageKeys  # of each pair's own image
    num_prefix_tokens: int

    def of(self, rows: Tensor | None) -> MapSource:
        """For pairs that share images: the same with the keys of each pair's image, rows [N]; None: one each."""
        return self if rows is None else replace(self, image=self.image.take(rows))

    def maps(self, word_index: Tensor, *, gradient: bool = True, normalize: str | None) -> Tensor:
        """Maps [N, W, patches] of the words at word_index [N, W, S]: Grad-CAM of the score or, without
        `gradient`, the attention itself. The backward pass stops at the attention; every `.grad` stays untouched."""
        options: dict[str, Any] = {}
        if gradient:
            total = at_least_fp32(self.score).sum()
            (grad_output,) = torch.autograd.grad(total, self.record.output, retain_graph=True)
            options = {"value": self.image.value, "grad_output": grad_output, "value_bias": self.record.value_bias}
        return ops.word_attention(
            self.record.query,
            self.image.key,
            word_index,
            num_prefix_tokens=self.num_prefix_tokens,
            normalize=normalize,
            **options,
        )


@dataclass
class Fused:
    """A pass over texts with their pictures: states, the recorded cross-attention, and every layer's keys and values
    of the pictures, [n B, H, P, E], the n pictures of the first text first."""

    states: Tensor
    record: CrossRecord | None
    keys: list[ImageKeys]


@dataclass(frozen=True)
class MapOptions:
    """How maps are made: of which fusion layer, of how many image tokens without the first, and scaled how."""

    layer: int
    num_prefix_tokens: int
    normalize: str | None


@contextmanager
def without_graph(unneeded: bool) -> Iterator[None]:
    """No graph where `unneeded`: below the recorded attention, where a map's gradient stops."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and not unneeded):
        yield


@torch.enable_grad()
def maps_by_picture(
    fused: Callable[[int], tuple[Tensor, Fused]], word_index: Tensor, options: MapOptions, *, pictures: int = 1
) -> Tensor:
    """Grad-CAM maps [B, pictures, W, patches] of the words at word_index [B, W, S].

    fused: the number of a layer -> the scores [B] that the maps explain, and the pass that recorded the layer. Texts of
    several pictures have a layer for each in turn.
    """
    maps = []
    for picture in range(pictures):
        score, found = fused(options.layer * pictures + picture)
        assert found.record is not None
        keys = found.keys[options.layer]
        image = ImageKeys(keys.key[picture::pictures], keys.value[picture::pictures])
        source = MapSource(score, found.record, image, options.num_prefix_tokens)
        maps.append(source.maps(word_index, normalize=options.normalize))
    return torch.stack(maps, dim=1)
