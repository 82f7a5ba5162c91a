"""Rank and number of ranks of this process, from the environment variables of its launcher.

`deepspeed`, torchrun and accelerate set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. `srun` and `mpirun`
set their own variables, from which these five follow. A process without a launcher is rank 0 of 1.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from softmask.ops import _backend
from softmask.training.config_files import ConfigError

PORT = 29500  # torchrun's


@dataclass(frozen=True)
class Launcher:
    """Names of a launcher's variables; the first that is set counts."""

    name: str
    rank: tuple[str, ...]
    world_size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...] = ()


LAUNCHERS = (
    Launcher("torchrun or deepspeed", ("RANK",), ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
    Launcher(
        "mpirun",
        ("OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"),
        ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ),
    # Before mpiexec, because srun sets PMI variables too.
    Launcher("srun", ("SLURM_PROCID",), ("SLURM_STEP_NUM_TASKS",), ("SLURM_LOCALID",)),
    Launcher("mpiexec", ("PMI_RANK",), ("PMI_SIZE",), ("MPI_LOCALRANKID",), ("MPI_LOCALNRANKS",)),
)


def complete_environment() -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT from the launcher's variables.

    Raises:
        ConfigError: variables that are missing, not numbers or contradictory.
    """
    os.environ.update(rank_variables(os.environ))


def check_environment() -> None:
    """Raise ConfigError for an unknown value of a variable that is read later."""
    try:
        _backend.named()
    except ValueError as error:
        raise ConfigError(f"environment: {error}") from error


def rank_variables(given: Mapping[str, str]) -> dict[str, str]:
    """The variables that `complete_environment` sets, from the variables `given`."""
    launcher = next((one for one in LAUNCHERS if _launched_by(one, given)), None)
    rank = _number(given, launcher.rank, 0) if launcher else 0
    world = _number(given, launcher.world_size, 1) if launcher else 1
    if launcher is None or (launcher.name != LAUNCHERS[0].name and rank == 0 and world == 1):
        _refuse_stray(given)
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"} | address
    if not _first(given, launcher.world_size):
        raise ConfigError(
            f"environment: {_first(given, launcher.rank)} is set without {launcher.world_size[0]}: expected both, or "
            "neither for a single process"
        )
    if not rank < world:
        names = f"{_first(given, launcher.rank)} and {_first(given, launcher.world_size)}"
        raise ConfigError(f"environment: {names}: expected a rank below the number of ranks, got {rank} of {world}")
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(_local_rank(given, launcher, rank, world)),
        "MASTER_ADDR": given.get("MASTER_ADDR") or _address(given, launcher, world),
        "MASTER_PORT": str(_master_port(given)),
    }


def _launched_by(launcher: Launcher, given: Mapping[str, str]) -> bool:
    """Whether its rank is set; SLURM_PROCID=0 is also set without srun, so there the step's number of tasks counts."""
    if launcher.name == "srun" and given.get("SLURM_PROCID", "0") == "0":
        return bool(_first(given, launcher.world_size))
    return bool(_first(given, launcher.rank))


def free_port() -> int:
    """A port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _first(given: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if given.get(name)), None)


def _number(given: Mapping[str, str], names: tuple[str, ...], default: int) -> int:
    name = _first(given, names)
    if name is None:
        return default
    if not re.fullmatch(r"\d{1,9}", given[name]):
        raise ConfigError(f"environment: {name}: expected a number >= 0, got {given[name]!r}")
    return int(given[name])


def _refuse_stray(given: Mapping[str, str]) -> None:
    """Refuse several processes without ranks: each would be rank 0 and write into the same folder."""
    tasks = _number(given, ("SLURM_NTASKS", "SLURM_NPROCS"), 1)
    if tasks > 1 and not given.get("SLURM_STEP_NUM_TASKS"):  # in the batch script itself, without srun
        raise ConfigError(
            f"environment: SLURM has {tasks} tasks, but srun did not start this process: start it with srun, or set "
            "SLURM_NTASKS=1 for a single process"
        )
    if _number(given, ("WORLD_SIZE",), 1) > 1:
        raise ConfigError(f"environment: WORLD_SIZE is {given['WORLD_SIZE']} without RANK: expected both")


def _local_rank(given: Mapping[str, str], launcher: Launcher, rank: int, world: int) -> int:
    others = tuple(name for one in LAUNCHERS for name in one.local_rank)
    if _first(given, launcher.local_rank + others):
        return _number(given, launcher.local_rank + others, 0)
    if _number(given, launcher.local_size, 0) == world or world == 1:
        return rank
    raise ConfigError(f"environment: {_first(given, launcher.rank)} is set without {launcher.local_rank[0]}: expected "
                      "the number of this process on its machine, which selects its GPU")  # fmt: skip


def _address(given: Mapping[str, str], launcher: Launcher, world: int) -> str:
    """Address of rank 0: the first of SLURM's nodes, or this machine if all ranks are on it."""
    nodes = given.get("SLURM_STEP_NODELIST") or given.get("SLURM_JOB_NODELIST") or given.get("SLURM_NODELIST")
    if nodes and launcher.name == "srun":
        return first_node(nodes)
    if world == 1 or _number(given, launcher.local_size, 0) == world:
        return "127.0.0.1"
    raise ConfigError(f"environment: {_first(given, launcher.rank)} is set without MASTER_ADDR: expected the host name "
                      "or address of rank 0's machine, the same on all ranks")  # fmt: skip


def first_node(nodes: str) -> str:
    """The first node of SLURM's list: gpu03 of "gpu[03-06,09],cpu1"."""
    match = re.fullmatch(r"([^\[\],]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?(?:,.*)?", nodes)
    if match is None:
        raise ConfigError(f"environment: SLURM's list of nodes: expected one such as gpu[01-04], got {nodes!r}")
    prefix, number, suffix = match.groups()
    if suffix and "[" in suffix:
        raise ConfigError(f"environment: cannot read SLURM's list of nodes {nodes!r}: set MASTER_ADDR")
    return prefix + (number or "") + (suffix or "")


def _master_port(given: Mapping[str, str]) -> int:
    """The given port, or one that is the same on all ranks and differs between jobs on a machine."""
    job = given.get("SLURM_JOB_ID", "")
    port = _number(given, ("MASTER_PORT",), 15000 + int(job) % 20000 if job.isdigit() else PORT)
    if not 0 < port < 1 << 16:
        raise ConfigError(f"environment: MASTER_PORT: expected 1 to 65535, got {port}")
    return port
