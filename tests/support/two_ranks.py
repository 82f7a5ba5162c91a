"""Run a function of a test in two gloo processes."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from pathlib import Path

import torch
import torch.distributed as dist

import softmask
from softmask.data import Batch
from softmask.ops import _backend

WORLD = 2


def run_on_two_ranks(function: Callable[[int], object], folder: Path) -> list:
    """``[function(0), function(1)]``, each called in its own process of one gloo world, with this process's backend.

    The processes are kept for the next call, since importing torch takes most of their time. A failure ends them.
    """
    calls = [
        pool.submit(_call, rank, function, str(folder), _backend.named()) for rank, pool in enumerate(_processes())
    ]
    done, _ = wait(calls, return_when=FIRST_EXCEPTION)
    failed = [error for call in done if (error := call.exception())]
    if failed:
        _end()
        raise failed[0]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


@functools.cache
def _processes() -> list[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    return [ProcessPoolExecutor(1, mp_context=context) for _ in range(WORLD)]


def _end() -> None:
    """Kill the processes: one rank may be waiting for the one that failed."""
    for pool in _processes():
        for process in pool._processes.values():
            process.kill()
        pool.shutdown()
    _processes.cache_clear()


def _call(rank: int, function: Callable[[int], object], folder: str, backend: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    try:
        with softmask.backend(backend):
            torch.save(function(rank), f"{folder}/rank{rank}.pt")
    finally:
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
