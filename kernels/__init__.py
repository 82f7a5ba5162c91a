"""Triton kernels, installed as ``softmask.kernels``: one file per op, imported when the op first runs.

This file does not import Triton. It tells where the kernels can run.
"""

from __future__ import annotations

import importlib.util
import os
import re
from importlib import metadata

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")  # as Triton reads it
"""Whether TRITON_INTERPRET=1 was set at import: kernels then take CPU tensors and run in numpy."""
OLDEST_TRITON = (3, 3)
"""The oldest release that compiles the kernels: earlier ones do not support tuples."""


def triton_version() -> str | None:
    """The version of the installed package, found without importing it; None if it is unknown."""
    for name in ("triton", "pytorch-triton"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def why_not_triton(version: str | None) -> str | None:
    """Why the kernels do not compile with this version of Triton; None if they do, or if the version is unknown."""
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    if numbers is None or tuple(map(int, numbers.groups())) >= OLDEST_TRITON:
        return None
    oldest = ".".join(map(str, OLDEST_TRITON))
    return f"Triton {version} cannot compile tuples in kernels; Triton {oldest} (torch 2.7) or newer is needed"


_TOO_OLD = why_not_triton(triton_version())


def why_not(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why kernels cannot take such tensors; None if they can. A CUDA device without an index is the current one."""
    device = torch.device(device)
    if not INSTALLED:
        return "Triton is not installed"
    if _TOO_OLD is not None:
        return _TOO_OLD
    if device.type == "cpu" and not INTERPRETED:
        return "Triton kernels take CUDA tensors (TRITON_INTERPRET=1 runs them on CPU tensors, slowly)"
    if device.type not in ("cuda", "cpu"):
        return f"Triton kernels take CUDA tensors, the inputs are on {device.type}"
    if device.type == "cuda" and torch.cuda.is_available() and not INTERPRETED:
        major = torch.cuda.get_device_properties(device).major
        if major < 8:
            return f"Triton kernels need a GPU of compute capability 8.0 or later, this one has {major}.x"
    if dtype not in DTYPES:
        return f"Triton kernels take fp32, fp16 and bf16, the inputs are {str(dtype).removeprefix('torch.')}"
    return None
