"""SyCoCa's caption head: the decoder's states to logits, or straight to the loss of the next tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from softmask.models.layers.numerics import at_least_fp32
from softmask.models.layers.token_loss import masked_token_loss

MOST_LOGITS = 2**26  # at a time, 256 MiB in fp32; above that, the backward pass recomputes them part by part


class CaptionHead(nn.Linear):
    """states [..., D] -> logits [..., V]. With labels [M], states [M, D] -> cross-entropy, summed over the tokens.

    At full size the logits of a batch of long captions would take several gigabytes.
    """

    def forward(self, states: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return super().forward(states)
        rows = max(MOST_LOGITS // self.out_features, 1)
        if len(labels) <= rows:
            return self._loss(states, labels)
        losses = [
            checkpoint(self._loss, part, target, use_reentrant=False, preserve_rng_state=False)
            for part, target in zip(states.split(rows), labels.split(rows), strict=True)
        ]
        return torch.stack(losses).sum()

    def _loss(self, states: Tensor, labels: Tensor) -> Tensor:
        # A view: autocast caches a parameter's bf16 copy and would sum the parts' gradients in bf16.
        logits = F.linear(states, self.weight.view_as(self.weight), self.bias)
        return masked_token_loss(at_least_fp32(logits), labels)
