"""How the models run their parts: with activations kept or computed again, alone or among other ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from softmask.ops import _backend


def checkpointed(function: Callable, *arguments: Any, recompute: bool) -> Any:
    """function(*arguments); with `recompute` its activations are not kept: the backward pass computes them again."""
    if not (recompute and torch.is_grad_enabled()):
        return function(*arguments)
    name = _backend.named()  # the backward pass may run where another is named, on a GPU in a thread of its own

    def by_name(*given: Any) -> Any:
        with _backend.backend(name):
            return function(*given)

    return checkpoint(by_name, *arguments, use_reentrant=False)


def all_ranks() -> dist.ProcessGroup | None:
    """The group of all ranks, None where there is one alone."""
    distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if distributed else None
