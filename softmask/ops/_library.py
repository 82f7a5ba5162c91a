"""The C++ extension: loads it, and says for which ops it has kernels and why there may be none."""

from __future__ import annotations

import importlib
import importlib.util
import warnings

from torch import Tensor

OPS = ("soft_mask", "word_attention")
"""Ops that have a C++ kernel for the CPU."""


def _load() -> str | None:
    """Load the extension; returns why there is none."""
    if importlib.util.find_spec("softmask._C") is None:
        return "the C++ extension softmask._C is not built (installing with a C++ compiler builds it)"
    try:
        importlib.import_module("softmask._C")
    except ImportError as error:  # built for another torch: say so and go on without
        warnings.warn(f"softmask's C++ extension does not load, PyTorch is used instead: {error}", stacklevel=2)
        return f"the C++ extension softmask._C does not load: {error}"
    return None


def no_second_derivative(op: str):
    """The backward of a backward: refuses, where autograd would otherwise be silently wrong."""

    def refuse(ctx, *grads: Tensor) -> None:
        raise RuntimeError(f"{op}: the C++ kernel has no second derivative; softmask.backend('reference') has")

    return refuse


MISSING = _load()
"""Why there are no C++ kernels; None where they are loaded."""
