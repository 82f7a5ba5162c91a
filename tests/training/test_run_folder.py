"""The files that a run writes, and the folders that it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from softmask.data import open_source
from softmask.training.checkpoint.state import CheckpointError
from softmask.training.checkpoint.store import find_checkpoint, load_model
from softmask.training.config import ConfigError, save_config
from softmask.training.engine.zero import deepspeed_config
from softmask.training.logs import cut_back
from softmask.training.optim import lr_factor
from softmask.training.pretrain import choose_checkpoint, main
from softmask.training.run_folder import prepare_run
from tests.support.train_fixtures import (
    assert_equal,
    make_config,
    make_trainer,
    rows,
    run_here,
    weights,
)

ZERO = [0, 1, 2, 3]
pytestmark = pytest.mark.usefixtures("plain_linear")


def test_run_writes_its_files(tmp_path, capfd) -> None:
    config = make_config(tmp_path, "train.log_every=2", "train.checkpoint_every=2", "train.accumulation=2")
    trainer = run_here(config)
    run = Path(config.output)
    logged = rows(config.output)
    assert [row["step"] for row in logged] == [2, 4, 6]
    assert [row["epoch"] for row in logged] == [0.5, 1.0, 1.5]
    assert {"loss", "itc", "itm", "itm_soft", "mlm", "temperature", "lr", "samples_per_second"} <= logged[0].keys()
    assert [row["lr"] for row in logged] == [1e-3 * lr_factor(step, config.optimizer, steps=6) for step in (1, 3, 5)]
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_00000004", "step_00000006"]
    assert json.loads((run / "done.json").read_text())["steps"] == 6
    assert list((run / "tensorboard").iterdir())
    state = json.loads((find_checkpoint(run) / "trainer.json").read_text())
    assert (state["step"], state["micro_batches"], state["world_size"]) == (6, 12, 1)
    output = capfd.readouterr().err
    for line in (
        "data     64 captions of 64 images in 1 files",
        "batch    16 = 8 x 2 accumulated x 1 ranks",
        "weights  random",
        "words    64 tokens of a WordPiece trained on the captions",
        "text     16 tokens at most, which cuts 0 of the first 64 texts",
    ):
        assert line in output.splitlines()
    (options,) = [line for line in output.splitlines() if line.startswith("options  ")]
    assert " train.accumulation=2 " in options and " model.queue_size=32 " in options and "gamma" not in options
    assert "step 4/6  loss " in output and "done: 6 steps" in output
    model, tokenizer, loaded = load_model(run)
    assert loaded == config and not model.training
    assert model.config.text.vocab_size == tokenizer.vocab_size
    assert_equal(weights(trainer), model.state_dict())


def test_unusable_checkpoints_are_refused(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_checkpoint(tmp_path)
    config = make_config(tmp_path, "train.steps=1")
    run_here(config)
    checkpoint = find_checkpoint(config.output)
    file = checkpoint / "mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="step_00000001: cannot be read"):
        load_model(checkpoint)
    with pytest.raises(CheckpointError, match="step_00000001: cannot be loaded"):
        run_here(config, checkpoint=checkpoint)
    file.unlink()
    with pytest.raises(CheckpointError, match="step_00000001: cannot be read"):
        load_model(checkpoint)


def test_existing_run_is_resumed_or_refused(tmp_path) -> None:
    config = make_config(tmp_path, "train.steps=1")
    run = Path(config.output)
    assert choose_checkpoint(config, "none") is None and choose_checkpoint(config, "auto") is None
    unfinished = run / "checkpoints" / "step_00000009.tmp"
    unfinished.mkdir(parents=True)
    assert choose_checkpoint(config, "auto") is None
    for number in (4, 8):
        folder = run / "checkpoints" / f"step_{number:08d}"
        folder.mkdir()
        (folder / "trainer.json").write_text("{}")
    assert choose_checkpoint(config, "auto").name == "step_00000008"
    with pytest.raises(CheckpointError, match="holds a run already .*--resume auto"):
        choose_checkpoint(config, "none")
    with pytest.raises(CheckpointError, match="step_00000008, which starting from .*step_00000004 would overwrite"):
        choose_checkpoint(config, str(run / "checkpoints" / "step_00000004"))
    elsewhere = make_config(tmp_path, f"output={tmp_path / 'other'}")
    assert choose_checkpoint(elsewhere, str(run)).name == "step_00000008"


def test_log_is_cut_back_to_the_step(tmp_path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    cut_back(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    path.write_text('{"step": 1}\n{"ste')
    cut_back(path, 2)
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.train=nowhere-*.tar"], "no file matches nowhere-*.tar"),
        (["--resume", "elsewhere"], "elsewhere: expected a step_... checkpoint or a run"),
        (["data.tokenizer=nowhere"], "data.tokenizer: nowhere is not a folder"),
    ],
)
def test_command_line_errors_are_one_line(tmp_path, monkeypatch, capfd, arguments: list[str], message: str) -> None:
    config = make_config(tmp_path)
    save_config(config, tmp_path / "config.yaml")
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--config", str(tmp_path / "config.yaml"), *arguments])
    assert main() == 2
    lines = "".join(capfd.readouterr()).strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], lines
    assert not (Path(config.output) / "checkpoints").exists()


@pytest.mark.parametrize("parameters", [7, 8])
def test_bucket_sizes_hold_the_model_and_are_even(parameters: int, tmp_path) -> None:
    section = deepspeed_config(make_config(tmp_path, "deepspeed.zero_optimization.stage=1"), parameters=parameters)
    assert section["zero_optimization"]["allgather_bucket_size"] == 8
    assert section["zero_optimization"]["reduce_bucket_size"] == 8


def test_preparing_a_longer_run_removes_done_json(tmp_path) -> None:
    run_here(make_config(tmp_path, "train.steps=2"))
    config = make_config(tmp_path, "train.steps=4")
    done = Path(config.output) / "done.json"
    assert done.exists()
    prepare_run(config, open_source(config.data.train), find_checkpoint(config.output))
    assert not done.exists()


def test_queue_smaller_than_the_batch_is_refused_before_the_first_step(tmp_path) -> None:
    with pytest.raises(ConfigError, match="model.queue_size: expected 0 or at least the batch of all ranks, 8, got 4"):
        make_trainer(make_config(tmp_path, "model.queue_size=4"))
