"""SyCoCa's caption head: states of the decoder to logits, or straight to the loss of the tokens that follow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from softmask.models.layers.numerics import at_least_fp32
from softmask.models.layers.token_loss import masked_token_loss

MOST_LOGITS = 2**26  # at a time, 256 MiB in fp32; where there are more, each part is made again for its gradient


class CaptionHead(nn.Linear):
    """states [..., D] -> logits [..., V]; with labels [M], of states [M, D], -> cross-entropy summed over the tokens.

    At full size the logits of a batch of long captions would take gigabytes, several times over.
    """

    def forward(self, states: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return super().forward(states)
        rows = max(MOST_LOGITS // self.out_features, 1)
        if len(labels) <= rows:
            return self._loss(states, labels)
        parts = zip(states.split(rows), labels.split(rows), strict=True)
        options = {"use_reentrant": False, "preserve_rng_state": False}
        return torch.stack([checkpoint(self._loss, *part, **options) for part in parts]).sum()

    def _loss(self, states: Tensor, labels: Tensor) -> Tensor:
        # A view: of a parameter autocast would share one bf16 copy, and add up the parts' gradients in bf16.
        logits = F.linear(states, self.weight.view_as(self.weight), self.bias)
        return masked_token_loss(at_least_fp32(logits), labels)
