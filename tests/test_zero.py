"""Two processes under the `deepspeed` launcher: ZeRO 0, 1 and 2 train alike, resume exactly and stop together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from train_fixtures import PRETRAIN, child_environment, different, make_config, saved_state

from softmask.train.checkpoint import CheckpointError, check_resumable, find_checkpoint
from softmask.train.config import save_config

STAGES = (0, 1, 2)
# Both ranks run this: every stage once to the end, and once stopped at step 2 and resumed.
WORKER = """
import dataclasses, sys
from softmask.train.checkpoint import find_checkpoint
from softmask.train.config import load_config
from softmask.train.trainer import Trainer, train

def stop_at_two(self, batches):
    outputs, stop = step(self, batches)
    return outputs, stop or self.progress.step == 2

base = load_config(sys.argv[-1])
for stage in (0, 1, 2):
    config = dataclasses.replace(base, deepspeed={"zero_optimization": {"stage": stage}})
    train(dataclasses.replace(config, output=f"{base.output}-{stage}-whole"))
    halves = dataclasses.replace(config, output=f"{base.output}-{stage}-halves")
    step, Trainer._step = Trainer._step, stop_at_two
    train(halves)
    Trainer._step = step
    train(halves, checkpoint=find_checkpoint(halves.output))
"""


def launch(script: Path, *arguments: str) -> subprocess.Popen:
    """The launcher with two ranks, in a process group of its own."""
    launcher = Path(sys.executable).with_name("deepspeed")
    port = 20000 + os.getpid() % 20000
    command = [str(launcher), "--num_accelerators", "2", "--master_port", str(port), str(script), *arguments]
    environment = child_environment() | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{launcher.parent}{os.pathsep}{environment['PATH']}"
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def rows(run: str) -> list[dict]:
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
    """Runs of every stage on two ranks; returns the beginning of their folders' names."""
    folder = tmp_path_factory.mktemp("zero")
    config = make_config(folder, "train.steps=4", "train.batch_size=4", "train.accumulation=2", "train.clip_grad=1")
    save_config(config, folder / "config.yaml")
    (folder / "worker.py").write_text(WORKER)
    process = launch(folder / "worker.py", str(folder / "config.yaml"))
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return config.output


def test_all_stages_train_alike(trained) -> None:
    """The stages add up the same gradients in another order: what differs is rounding."""
    reference = rows(f"{trained}-0-whole")
    assert len(reference) == 4 and reference[-1]["epoch"] == 1.0
    for stage in (1, 2):
        for row, expected in zip(rows(f"{trained}-{stage}-whole"), reference, strict=True):
            terms = {name for name in expected if name not in ("seconds", "samples_per_second")}
            assert {name: row[name] for name in terms} == pytest.approx(
                {name: expected[name] for name in terms}, rel=1e-5
            )


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_resume_exactly(trained, stage: int) -> None:
    whole, halves = saved_state(f"{trained}-{stage}-whole"), saved_state(f"{trained}-{stage}-halves")
    assert different(whole, halves) == []
    assert any("optim_states" in name for name in whole) == (stage > 0)


def test_another_number_of_ranks_is_refused(trained) -> None:
    checkpoint = find_checkpoint(f"{trained}-1-whole")
    from softmask.train.config import load_config

    with pytest.raises(CheckpointError, match=r"number of ranks \(was 2, now 1\)"):
        check_resumable(checkpoint, load_config(checkpoint / "config.yaml"), world_size=1)


def test_launcher_passes_the_stop_signal_on(tmp_path) -> None:
    """SIGTERM to the launcher's process group, as a batch system sends it: both ranks agree on the step and save."""
    overrides = ["train.steps=100000", "data.workers=1", "deepspeed.zero_optimization.stage=2"]
    config = make_config(tmp_path, *overrides)
    save_config(config, tmp_path / "config.yaml")
    process = launch(PRETRAIN, "--config", str(tmp_path / "config.yaml"))
    log, deadline = Path(config.output) / "log.jsonl", time.monotonic() + 200
    while not (log.exists() and log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert "stopped, go on with --resume auto" in output and "Traceback" not in output, output
    checkpoint = find_checkpoint(config.output)
    assert json.loads((checkpoint / "trainer.json").read_text())["step"] == rows(config.output)[-1]["step"]
    states = [torch.load(path, weights_only=False) for path in sorted(checkpoint.glob("*optim_states.pt"))]
    assert len(states) == 2
