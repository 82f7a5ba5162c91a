"""Triton kernels, installed as ``softmask.kernels``. This needs no Triton: it only says which ops have a kernel."""

from __future__ import annotations

OPS: dict[str, str] = {}
"""Name of the op -> module of this package that holds its kernel."""
