"""Maps of words over an image, from one cross-attention of a fused pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from softmask import ops
from softmask.models.layers.numerics import at_least_fp32
from softmask.models.softmask_pp.fusion import CrossRecord, ImageKeys


@dataclass
class MapSource:
    """Matching logits [N, 2] of pairs, and the cross-attention that explains them."""

    match: Tensor
    record: CrossRecord
    image: ImageKeys  # of each pair's own image
    num_prefix_tokens: int

    def of(self, rows: Tensor | None) -> MapSource:
        """For pairs that share images: the same with the keys of each pair's image, rows [N]; None: one each."""
        return self if rows is None else replace(self, image=self.image.take(rows))

    def maps(self, word_index: Tensor, *, gradient: bool = True, normalize: str | None) -> Tensor:
        """Maps [N, W, patches] of the words at word_index [N, W, S]: Grad-CAM of the match logit or, without
        `gradient`, the attention itself. The backward pass stops at the attention; every `.grad` stays untouched."""
        options: dict[str, Any] = {}
        if gradient:
            score = at_least_fp32(self.match[:, 1]).sum()
            (grad_output,) = torch.autograd.grad(score, self.record.output, retain_graph=True)
            options = {"value": self.image.value, "grad_output": grad_output, "value_bias": self.record.value_bias}
        return ops.word_attention(
            self.record.query,
            self.image.key,
            word_index,
            num_prefix_tokens=self.num_prefix_tokens,
            normalize=normalize,
            **options,
        )
