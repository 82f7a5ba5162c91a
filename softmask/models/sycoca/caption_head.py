"""SyCoCa's caption decoder, and its head: states to logits, or straight to the loss of the next tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from softmask.models.layers.numerics import at_least_fp32, initialize
from softmask.models.layers.token_loss import masked_token_loss
from softmask.models.layers.transformer import CrossDecoder
from softmask.models.sycoca.config import CausalTextConfig

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


def caption_parts(text: CausalTextConfig, *, image_width: int) -> tuple[CrossDecoder, CaptionHead]:
    """The caption decoder and its head with new weights."""
    sizes = text.width, text.heads, text.decoder_layers
    decoder = CrossDecoder(*sizes, source_width=image_width, causal=True, library=text.attention)
    head = CaptionHead(text.width, text.vocab_size, bias=False)
    for part in (decoder, head):
        initialize(part, std=text.initializer_range)
    if text.style == "open_clip":
        decoder.initialize_as_open_clip()
        nn.init.normal_(head.weight, std=text.width**-0.5)
    return decoder, head
