"""Two gloo processes that run one function of the tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from softmask.data import Batch

WORLD = 2


def run_on_two_ranks(function: Callable[[int], object], folder: Path) -> list:
    """``[function(0), function(1)]``, each called in a process of its own inside one gloo world."""
    mp.spawn(_worker, (function, str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


def _worker(rank: int, function: Callable[[int], object], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    torch.save(function(rank), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def average_gradients(parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    """What DDP and ZeRO do after backward."""
    for parameter in parameters:
        dist.all_reduce(parameter.grad)
    return [parameter.grad / WORLD for parameter in parameters]


def own_half(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    return tensor.chunk(WORLD)[rank]


def own_rows(batch: Batch, rank: int) -> Batch:
    halves = {name: own_half(value, rank) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(batch, **halves)
