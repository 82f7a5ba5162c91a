"""Triton kernels, installed as ``softmask.kernels``: one file per op, imported when the op first runs.

This file needs no Triton: it says where the kernels run.
"""

from __future__ import annotations

import importlib.util
import os

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")  # as Triton reads it
"""Kernels take CPU tensors and run in numpy: TRITON_INTERPRET=1 at import."""


def why_not(device: str, dtype: torch.dtype) -> str | None:
    """Why kernels cannot take such tensors; None where they can."""
    device = torch.device(device).type
    if not INSTALLED:
        return "Triton is not installed"
    if device == "cpu" and not INTERPRETED:
        return "Triton kernels take CUDA tensors (TRITON_INTERPRET=1 runs them on CPU tensors, slowly)"
    if device not in ("cuda", "cpu"):
        return f"Triton kernels take CUDA tensors, the inputs are on {device}"
    if device == "cuda" and torch.cuda.is_available() and not INTERPRETED:
        major = torch.cuda.get_device_properties(torch.cuda.current_device()).major
        if major < 8:
            return f"Triton kernels need a GPU of compute capability 8.0 or later, this one has {major}.x"
    if dtype not in DTYPES:
        return f"Triton kernels take fp32, fp16 and bf16, the inputs are {str(dtype).removeprefix('torch.')}"
    return None
