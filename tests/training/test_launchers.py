"""Ranks from the variables of torchrun, srun and mpirun; incomplete variables are refused."""

from __future__ import annotations

import pytest

from softmask.training.config import ConfigError
from softmask.training.launchers import first_node, rank_variables

SLURM = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1234"}


def test_process_without_a_launcher_is_rank_0_of_1() -> None:
    batch_script = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    for given in ({}, batch_script, batch_script | {"SLURM_STEP_NUM_TASKS": "1"}):
        found = rank_variables(given)
        assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == ("0", "0", "1")
        assert found["MASTER_ADDR"] == "127.0.0.1" and int(found["MASTER_PORT"]) > 1024


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (TORCHRUN, ("3", "4", "1", "a", "1234")),
        (TORCHRUN | SLURM, ("3", "4", "1", "a", "1234")),  # inside srun, launched by torchrun
        (SLURM | {"SLURM_STEP_NODELIST": "gpu[03-06]"}, ("5", "8", "1", "gpu03", "15077")),
        (SLURM | {"SLURM_JOB_NODELIST": "a1,a2", "SLURM_STEP_NUM_TASKS": "6"}, ("5", "6", "1", "a1", "15077")),
        (SLURM | {"SLURM_NODELIST": "a1", "PMIX_RANK": "5", "PMI_RANK": "5"}, ("5", "8", "1", "a1", "15077")),
        (SLURM | {"MASTER_ADDR": "b", "MASTER_PORT": "9"}, ("5", "8", "1", "b", "9")),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, ("1", "2", "1", "127.0.0.1", "29500")),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MASTER_ADDR": "c"},
            ("1", "2", "0", "c", "29500"),
        ),
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_LOCALID": "0", "MASTER_ADDR": "d"}, ("1", "2", "0", "d", "29500")),
    ],
)
def test_ranks_are_read_from_the_launchers_variables(given: dict[str, str], expected: tuple[str, ...]) -> None:
    found = rank_variables(given)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert tuple(found[name] for name in names) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"RANK": "0"}, "RANK is set without WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 without RANK"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK is set without LOCAL_RANK"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK: expected a number >= 0, got 'one'"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "expected a rank below the number of ranks, got 2 of 2"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "RANK is set without MASTER_ADDR"),
        (TORCHRUN | {"MASTER_PORT": "-1"}, "MASTER_PORT: expected a number >= 0, got '-1'"),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID is set without SLURM_LOCALID"),
        (TORCHRUN | {"MASTER_PORT": "99999"}, "MASTER_PORT: expected 1 to 65535, got 99999"),
        (
            SLURM | {"SLURM_NODELIST": "rack[0-1]n[0-3]"},
            "cannot read SLURM's list of nodes 'rack[0-1]n",
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, "SLURM has 8 tasks, but srun did not start"),
        ({"SLURM_NTASKS": "8"}, "SLURM has 8 tasks, but srun did not start"),
        ({"SLURM_PROCID": "1"}, "SLURM_PROCID is set without SLURM_STEP_NUM_TASKS"),
        (OPEN_MPI, "OMPI_COMM_WORLD_RANK is set without MASTER_ADDR"),
    ],
)
def test_incomplete_or_invalid_variables_are_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        rank_variables(given)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("gpu[03-06,09],cpu1", "gpu03"), ("n[7]-ib", "n7-ib"), ("x-y[1,4-5],z", "x-y1")],
)
def test_first_node_of_a_slurm_node_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first
