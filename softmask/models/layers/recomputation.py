"""How the models run their parts: keeping activations or recomputing them, on one rank or on several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from softmask.ops import _backend


def checkpointed(function: Callable, *arguments: Any, recompute: bool) -> Any:
    """function(*arguments). With `recompute` its activations are dropped, and the backward pass computes them again."""
    if not (recompute and torch.is_grad_enabled()):
        return function(*arguments)
    name = _backend.named()  # the backward pass may run under another choice, and on a GPU runs in another thread

    def run(*given: Any) -> Any:
        with _backend.backend(name):
            return function(*given)

    return checkpoint(run, *arguments, use_reentrant=False)


def all_ranks() -> dist.ProcessGroup | None:
    """The group of all ranks; None on a single one."""
    distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if distributed else None
