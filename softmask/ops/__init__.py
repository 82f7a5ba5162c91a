"""The public ops, each as a function and as a module. Only torch is required."""

from __future__ import annotations

from softmask.ops.attentive_mask import AttentiveMask, attentive_mask
from softmask.ops.contrastive import FocalContrastiveLoss, focal_contrastive_loss
from softmask.ops.masked_patch_loss import MaskedPatchLoss, masked_patch_loss
from softmask.ops.momentum_contrastive import MomentumContrastiveLoss, momentum_contrastive_loss
from softmask.ops.soft_mask import SoftMask, soft_mask
from softmask.ops.soft_mask_attention import SoftMaskAttention, soft_mask_attention
from softmask.ops.word_attention import WordAttention, word_attention

__all__ = [
    "AttentiveMask",
    "FocalContrastiveLoss",
    "MaskedPatchLoss",
    "MomentumContrastiveLoss",
    "SoftMask",
    "SoftMaskAttention",
    "WordAttention",
    "attentive_mask",
    "focal_contrastive_loss",
    "masked_patch_loss",
    "momentum_contrastive_loss",
    "soft_mask",
    "soft_mask_attention",
    "word_attention",
]
