"""How the models run their parts: with activations kept or computed again, alone or among other ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint


def run(function: Callable, *arguments: Any, again: bool) -> Any:
    """function(*arguments); `again`: its activations are not kept, the backward pass computes them again."""
    if again and torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False)
    return function(*arguments)


def all_ranks() -> dist.ProcessGroup | None:
    """The group of all ranks, None where there is one alone."""
    distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if distributed else None
