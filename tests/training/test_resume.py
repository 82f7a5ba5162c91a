"""Runs that are killed or asked to stop, and then resumed, end with the bits of an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from softmask.training.checkpoint.state import CheckpointError
from softmask.training.checkpoint.store import complete_checkpoints, find_checkpoint
from softmask.training.config import Config, save_config
from softmask.training.logs import RunLog
from softmask.training.pretrain import choose_checkpoint
from tests.support.train_fixtures import different, make_config, run_cli, run_here, saved_state, start_cli, write_shard

LONG = ["train.steps=14", "train.checkpoint_every=4", "data.workers=1", "train.accumulation=2"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Config:
    config = make_config(tmp_path_factory.mktemp("uninterrupted"), *LONG)
    run_here(config)
    return config


def in_another_folder(config: Config, folder: Path) -> Config:
    return make_config(folder, *LONG, data=Path(config.data.train))


def logged_steps(config: Config) -> list[int]:
    path = Path(config.output) / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def wait_for_step(process: subprocess.Popen, config: Config, step: int) -> None:
    deadline = time.monotonic() + 200
    while step not in logged_steps(config):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)


class Killed(BaseException):
    """Stands in for kill -9: nothing in the trainer catches it."""


def kill_after(monkeypatch, step: int) -> None:
    """End the run in the middle of its bookkeeping for `step`, before a checkpoint is written."""
    row = RunLog.row

    def fatal(self, content):
        row(self, content)
        if content["step"] == step:
            raise Killed

    monkeypatch.setattr(RunLog, "row", fatal)


def test_killed_run_resumes_to_the_same_bits(uninterrupted, tmp_path) -> None:
    """kill -9 of the real process at a random step, loader worker included; resumed by `--resume auto`."""
    config = in_another_folder(uninterrupted, tmp_path)
    process = start_cli(config)
    wait_for_step(process, config, random.Random().randint(4, 12))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (Path(config.output) / "done.json").exists()
    resumed = start_cli(config, "--resume", "auto")
    output, _ = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, output
    assert different(saved_state(uninterrupted.output), saved_state(config.output)) == []
    assert logged_steps(config) == list(range(1, 15))

    again = run_cli("--config", str(Path(config.output).with_suffix(".yaml")), "--resume", "auto")
    assert again.returncode == 0 and again.stderr == f"done: {config.output} is finished, 14 steps\n"


def test_sigterm_writes_a_checkpoint(uninterrupted, tmp_path) -> None:
    config = in_another_folder(uninterrupted, tmp_path)
    process = start_cli(config)
    wait_for_step(process, config, 5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0 and "stopped, go on with --resume auto" in output, output
    checkpoint = find_checkpoint(config.output)
    last = logged_steps(config)[-1]
    assert json.loads((checkpoint / "trainer.json").read_text())["step"] == last and 5 <= last < 14
    run_here(config, checkpoint=checkpoint)
    assert different(saved_state(uninterrupted.output), saved_state(config.output)) == []


@pytest.mark.parametrize(
    "overrides",
    [
        ["deepspeed.zero_optimization.stage=1", "train.clip_grad=1"],
        ["deepspeed.zero_optimization.stage=2", "train.precision=bf16"],
        ["deepspeed.zero_optimization.stage=1", "train.precision=fp16"],
        ["deepspeed.zero_optimization.stage=3", "train.precision=fp16", "train.clip_grad=1"],
    ],
    ids=lambda overrides: " ".join(override.rpartition(".")[2] for override in overrides),
)
@pytest.mark.usefixtures("plain_linear")
def test_resumes_exactly_at_every_stage_and_precision(tmp_path, monkeypatch, overrides: list[str]) -> None:
    overrides = [*overrides, "train.steps=7", "train.checkpoint_every=2"]
    whole = make_config(tmp_path, *overrides, f"output={tmp_path / 'whole'}")
    run_here(whole)
    config = make_config(tmp_path, *overrides)
    with monkeypatch.context() as patch:
        kill_after(patch, 5)
        with pytest.raises(Killed):
            run_here(config)
    assert find_checkpoint(config.output).name == "step_00000004"
    run_here(config, checkpoint=find_checkpoint(config.output))
    assert different(saved_state(whole.output), saved_state(config.output)) == []
    assert logged_steps(config) == list(range(1, 8))


def test_run_killed_while_writing_a_checkpoint_resumes_from_the_one_before(tmp_path, monkeypatch) -> None:
    """The incomplete folder is not read, and the next checkpoint removes it."""
    config = make_config(tmp_path, "train.steps=4", "train.checkpoint_every=2")
    rename = Path.rename

    def fatal(self, target):
        if Path(target).name == "step_00000004":
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fatal)
        with pytest.raises(Killed):
            run_here(config)
    folder = Path(config.output) / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"step_00000002", "step_00000004.tmp"}
    assert find_checkpoint(config.output).name == "step_00000002"
    run_here(config, checkpoint=find_checkpoint(config.output))
    assert {path.name for path in folder.iterdir()} == {"step_00000002", "step_00000004"}


def test_run_killed_before_the_first_checkpoint_starts_afresh(tmp_path, monkeypatch) -> None:
    whole = make_config(tmp_path, "train.steps=3", f"output={tmp_path / 'whole'}")
    run_here(whole)
    config = make_config(tmp_path, "train.steps=3")
    with monkeypatch.context() as patch:
        kill_after(patch, 2)
        with pytest.raises(Killed):
            run_here(config)
    checkpoint = choose_checkpoint(config, "auto")
    assert checkpoint is None
    run_here(config, checkpoint=checkpoint)
    assert different(saved_state(whole.output), saved_state(config.output)) == []
    assert logged_steps(config) == [1, 2, 3]


def test_half_deleted_checkpoint_is_not_complete(tmp_path, monkeypatch) -> None:
    """As after a kill while old checkpoints are removed."""
    config = make_config(tmp_path, "train.steps=3", "train.checkpoint_every=1", "train.keep_checkpoints=1")

    def fatal(path, *_arguments, **_options):
        (Path(path) / "mp_rank_00_model_states.pt").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("softmask.training.checkpoint.store.shutil.rmtree", fatal)
        with pytest.raises(Killed):
            run_here(config)
    assert [path.name for path in complete_checkpoints(Path(config.output))] == ["step_00000002"]


def test_longer_run_resumes_with_new_hyperparameters(tmp_path) -> None:
    scales = "optimizer.lr_scales={itm_head: 2}"
    run_here(make_config(tmp_path, "train.steps=2", scales))
    longer = make_config(tmp_path, "train.steps=4", "optimizer.lr=5e-4", "optimizer.weight_decay=0.5", scales)
    trainer = run_here(longer, checkpoint=find_checkpoint(longer.output))
    rates = [json.loads(line)["lr"] for line in (Path(longer.output) / "log.jsonl").read_text().splitlines()]
    assert trainer.progress.step == 4 and rates[2] == pytest.approx(5e-4, rel=1e-12)
    groups = trainer.engine.lr_scheduler.optimizer.param_groups
    assert [(group["lr_scale"], group["weight_decay"]) for group in groups] == [(2, 0.5), (2, 0), (1, 0.5), (1, 0)]
    peak = [group["initial_lr"] for group in groups]
    assert peak == trainer.engine.lr_scheduler.base_lrs == [1e-3, 1e-3, 5e-4, 5e-4]
    assert (trainer.finished, trainer.engine.lr_scheduler.last_epoch) == (True, 4)


def test_resuming_checks_the_data_and_not_its_path(tmp_path) -> None:
    """Moved shards are accepted; other shards are refused whatever their name."""
    config = make_config(tmp_path, "train.steps=2", "train.checkpoint_every=1", "data.max_bad_share=1")
    run_here(config)
    first = find_checkpoint(config.output).with_name("step_00000001")
    (tmp_path / "moved").mkdir()
    (tmp_path / "train.tar").rename(tmp_path / "moved" / "t.tar")
    write_shard(tmp_path / "train.tar", count=63)
    write_shard(tmp_path / "other.tar", broken=(3,))
    for train, message in (
        ("train.tar", "was 64 captions of 64 images, now 63 captions of 63 images"),
        ("other.tar", "was 64 captions of 64 images, now 64 captions of 64 images with other bytes"),
    ):
        other = make_config(tmp_path, "train.steps=3", "data.max_bad_share=1", data=tmp_path / train)
        with pytest.raises(CheckpointError, match=f"made with other data .{message}"):
            run_here(other, checkpoint=first)
    moved = make_config(tmp_path, "train.steps=3", "data.max_bad_share=1", data=tmp_path / "moved" / "t.tar")
    assert run_here(moved, checkpoint=find_checkpoint(config.output)).finished


def test_folder_that_another_process_writes_is_refused(tmp_path) -> None:
    config = make_config(tmp_path, "train.steps=10000", "data.workers=1")
    process = start_cli(config)
    wait_for_step(process, config, 1)
    second = run_cli("--config", str(Path(config.output).with_suffix(".yaml")), "--resume", "auto")
    message = f"error: output: {config.output} is written by another process (process {process.pid} of "
    assert second.returncode == 2 and second.stderr.startswith(message) and len(second.stderr.splitlines()) == 1
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0


def test_failed_write_of_a_checkpoint_is_one_line(tmp_path, monkeypatch) -> None:
    """torch's own message would be "unexpected pos 128 vs 0"."""
    config = make_config(tmp_path, "train.steps=1")

    def fails(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 128 vs 0")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(
        CheckpointError, match=r"step_00000001.tmp: cannot be written \(.*pos 128.*; [\d,]+ MiB are free"
    ):
        run_here(config)


def test_resumes_with_a_line_of_zeros_in_the_log(tmp_path) -> None:
    """As a file system may leave it after a power failure."""
    config = make_config(tmp_path, "train.steps=2")
    run_here(config)
    log = Path(config.output) / "log.jsonl"
    log.write_bytes(log.read_bytes() + b"\0" * 64 + b"\n")
    longer = make_config(tmp_path, "train.steps=3")
    run_here(longer, checkpoint=find_checkpoint(config.output))
    assert logged_steps(longer) == [1, 2, 3]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.embed_dim=8", "model.embed_dim (was 16, now 8)"),
        ("data.max_length=9", "data.max_length (was 16, now 9)"),
        ("train.batch_size=4", "train.batch_size (was 8, now 4)"),
        ("seed=1", "seed (was 3, now 1)"),
        ("optimizer.lr_scales={itm_head: 2}", "optimizer.lr_scales (was {}, now {'itm_head': 2.0})"),
    ],
)
def test_another_configuration_is_refused(tmp_path_factory, finished_run, override: str, named: str) -> None:
    folder = Path(finished_run.output).parent
    config = make_config(folder, "train.steps=3", override)
    with pytest.raises(CheckpointError) as error:
        run_here(config, checkpoint=find_checkpoint(config.output))
    assert str(error.value).endswith(f"made with another configuration: {named}")


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Config:
    config = make_config(tmp_path_factory.mktemp("finished"), "train.steps=1")
    run_here(config)
    return config


def test_existing_run_is_not_overwritten(finished_run, tmp_path) -> None:
    """Without --resume, or with another configuration, a run's folder keeps every byte."""
    run = Path(finished_run.output)
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    save_config(finished_run, tmp_path / "config.yaml")
    config = str(tmp_path / "config.yaml")
    first = run_cli("--config", config)
    second = run_cli("--config", config, "--resume", "auto", "model.embed_dim=8")
    for result, text in ((first, "holds a run already"), (second, "model.embed_dim (was 16, now 8)")):
        assert result.returncode == 2 and result.stderr.startswith("error: ") and text in result.stderr
        assert len((result.stdout + result.stderr).strip().splitlines()) == 1
    assert before == {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def test_sigterm_ends_the_loader_workers(tmp_path) -> None:
    """The loader's worker ignores SIGTERM, but must end with the process that started it."""
    config = make_config(tmp_path, "train.steps=10000", "data.workers=1")
    process = start_cli(config)
    wait_for_step(process, config, 1)
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert workers
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)
    assert torch.load(find_checkpoint(config.output) / "mp_rank_00_model_states.pt", weights_only=False)["module"]
