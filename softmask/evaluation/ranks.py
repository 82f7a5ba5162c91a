"""Evaluation over processes. The work is cut into the same pieces on any number of them, so that results are equal to
the last digit."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from softmask.training.engine.startup import check_device
from softmask.training.launchers import complete_environment

P = TypeVar("P")
R = TypeVar("R")


def start() -> None:
    """Join the processes that a launcher (torchrun, deepspeed, srun, mpirun) has started, each with its own GPU.

    Raises:
        ConfigError: the launcher's variables contradict each other, or there are more processes than GPUs.
    """
    complete_environment()
    if int(os.environ["WORLD_SIZE"]) == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        check_device(int(os.environ["LOCAL_RANK"]), torch.cuda.device_count())
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share_out(pieces: Sequence[P], work: Callable[[P], R], *, show: str) -> list[R]:
    """``[work(piece) for piece in pieces]`` on every rank; each rank does every world_size-th piece. Rank 0 shows a bar
    of its progress with the name `show`.

    Results travel pickled: keep them small and on the CPU.
    """
    size, shown = world_size(), tqdm(pieces, desc=show, disable=True if rank() else None, leave=False)
    return merge({number: work(piece) for number, piece in enumerate(shown) if number % size == rank()})


def merge(own: dict[int, R]) -> list[R]:
    """The results of all ranks, on every rank, in the order of their pieces. own: number of a piece -> its result."""
    gathered: list[Any] = [own]
    if world_size() > 1:
        gathered = [None] * world_size()
        dist.all_gather_object(gathered, own)
    found = {number: result for part in gathered for number, result in part.items()}
    return [found[number] for number in sorted(found)]
