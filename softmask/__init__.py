"""softmask: kernels and training for vision-language pre-training with text-driven masks.

``softmask.ops`` holds the layers, ``softmask.backend`` chooses what runs them, ``python -m softmask.env`` says what is
there. Importing the package alone loads nothing else, torch included.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from softmask._version import __version__

if TYPE_CHECKING:
    from softmask.ops._backend import BackendError, backend

__all__ = ["BackendError", "__version__", "backend"]


def __getattr__(name: str) -> object:
    if name in ("backend", "BackendError"):
        from softmask.ops import _backend

        return getattr(_backend, name)
    if name == "ops":
        return importlib.import_module("softmask.ops")
    raise AttributeError(f"module 'softmask' has no attribute {name!r}")
