"""Triton kernels, installed as ``softmask.kernels``: one file per op, imported when the op first runs.

This file needs no Triton: it says which ops have kernels, and where they run.
"""

from __future__ import annotations

import importlib.util
import os

import torch

OPS = {
    "word_attention": "word_attention",
    "soft_mask": "soft_mask",
    "focal_contrastive_loss": "contrastive",
    "momentum_contrastive_loss": "momentum_contrastive",
    "soft_mask_attention": "soft_mask_attention",
    "attentive_mask": "attentive_mask",
    "masked_patch_loss": "masked_patch_loss",
}
"""Name of the op -> module of this package that holds its kernels."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(device: str, dtype: torch.dtype) -> str | None:
    """Why kernels cannot take such tensors; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device not in ("cuda", "cpu"):
        return f"Triton kernels take CUDA tensors, the inputs are on {device}"
    if device == "cpu" and not _interpreted():
        return "Triton kernels take CUDA tensors (TRITON_INTERPRET=1 runs them on CPU tensors, slowly)"
    if dtype not in DTYPES:
        return f"Triton kernels take fp32, fp16 and bf16, the inputs are {str(dtype).removeprefix('torch.')}"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
