"""Failures of the machine end in one line: memory, ports, killed workers, lost ranks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from softmask.evaluation import evaluate
from softmask.report import build as report
from softmask.training import pretrain
from softmask.training.config import ConfigError, save_config
from softmask.training.engine.startup import check_device
from softmask.training.failures import explain
from tests.support.evaluation_files import write_run, write_scenes
from tests.support.train_fixtures import ROOT, make_config

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ... of which ...")


class KilledWorker(Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index


def raised(call) -> Exception:
    with pytest.raises(Exception) as caught:  # the caller tests the message
        call()
    return caught.value


def test_real_failures_are_explained() -> None:
    cases = {
        "out of memory: less (": lambda: torch.empty(1 << 46),
        "data.workers: a worker died": lambda: list(DataLoader(KilledWorker(), num_workers=1)),
    }
    for expected, call in cases.items():
        line = explain(raised(call), smaller="less")
        assert line.startswith(expected) and "\n" not in line and len(line) < 400, line
    named = RuntimeError("[enforce fail at ../device.cc:84] ifa != nullptr. Unable to find address for: nope0")
    assert explain(named, smaller="").startswith("GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME: this machine has no such")
    assert explain(ValueError("x"), smaller="") is explain(RuntimeError("size mismatch"), smaller="") is None


JOIN = """
import datetime, torch.distributed as dist
from softmask.training.failures import explain
try:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=1))
except Exception as error:
    print(explain(error, smaller=""))
"""


@pytest.mark.parametrize(
    ("rank", "message"), [("0", "MASTER_PORT: port {} is taken on this machine"), ("1", "cannot reach rank 0 there")]
)
def test_taken_port_and_unreachable_rank_0_are_explained(rank: str, message: str) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = str(taken.getsockname()[1])
        if rank == "0":
            taken.listen()
        world = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-c", JOIN]
        output = subprocess.run(command, env=os.environ | world, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert message.format(port) in output.stdout and len(output.stdout.splitlines()) == 1, output


RANK = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
if dist.get_rank() == int(os.environ["LEAVES"]):
    os._exit(0)
from softmask.training.failures import explain
try:
    for _ in range(100):
        dist.all_reduce(torch.ones(3))
except Exception as error:
    print(explain(error, smaller=""))
"""


@pytest.mark.parametrize("leaves", [0, 1])
def test_lost_rank_is_explained_on_the_other_rank(leaves: int, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LEAVES": str(leaves)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK], env=os.environ | common | {"RANK": str(rank)}, cwd=ROOT,
                         stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert outputs[leaves] == ""
    assert outputs[1 - leaves].startswith("lost the connection to another rank; the rank that ended first says why (")


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_device(1, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(ConfigError, match=r"below 1 \(CUDA_VISIBLE_DEVICES=3\), got 1; start as many ranks as GPUs"):
        check_device(1, 1)


def test_out_of_memory_ends_commands_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise OUT_OF_MEMORY

    data = write_scenes(tmp_path / "test.tar")
    run = write_run(tmp_path, data)
    config = tmp_path / "config.yaml"
    save_config(make_config(tmp_path, f"output={tmp_path / 'new'}"), config)
    monkeypatch.setattr(pretrain, "train", fail)
    monkeypatch.setattr(evaluate, "load_scorer", fail)
    monkeypatch.setattr(report, "build_page", fail)
    for call, advice in (
        (lambda: pretrain.main(["--config", str(config)]), "error: out of memory: lower train.batch_size and raise"),
        (
            lambda: evaluate.main([str(run), "--data", data]),
            "evaluate: out of memory: lower --batch-size or --beams (CUDA",
        ),
        (lambda: report.main([str(run), "--data", data]), "report: out of memory: lower --batch-size (CUDA"),
    ):
        assert call() in (1, 2)
        output = capsys.readouterr()
        (line,) = (output.out + output.err).splitlines()
        assert line.startswith(advice)
    monkeypatch.setattr(pretrain, "train", lambda *_, **__: 1 / 0)  # a bug must keep its traceback
    with pytest.raises(ZeroDivisionError):
        pretrain.main(["--config", str(config)])
