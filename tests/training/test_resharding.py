"""A checkpoint resumes at another ZeRO stage and number of ranks: with the same bits of state, and losses that differ
only by rounding."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from softmask.data import open_source
from softmask.training.checkpoint.reshard import MOMENTS, SavedState
from softmask.training.checkpoint.state import CheckpointError
from softmask.training.checkpoint.store import check_resumable, find_checkpoint, load_model
from softmask.training.config import Config, load_config, save_config
from softmask.training.engine.startup import start_distributed
from softmask.training.optim import parameter_groups
from softmask.training.run_folder import prepare_run
from softmask.training.trainer import Trainer
from tests.support.train_fixtures import ROOT, assert_rows_close, make_config, rows, run_on_two_ranks

# Only terms without random numbers of a rank, so that two ranks with batches of 4 train as one with 8.
OVERRIDES = ["train.steps=4", "train.accumulation=2", "train.clip_grad=1", "model.contrast_steps=100"]
OVERRIDES += ["model.mask_text=mlm", "model.text.dropout=0", "model.text.attention_dropout=0"]
# Well above rounding: with 1e-8, Adam turns gradients that are only rounding into full steps.
OVERRIDES += ["optimizer.eps=1e-5"]
# Stage 3 does not partition parameters smaller than this.
THRESHOLD = {"stage3_param_persistence_threshold": 50}
WORKER = """
import sys
from tests.training.test_resharding import run
from softmask.training.config import load_config

config = load_config(sys.argv[-1], ["train.batch_size=4"])
run(config, "two-1", stage=1, stop_at=2)
run(config, "two-3", stage=3, stop_at=2)
run(config, "one-1-on-two", stage=3, source="one-1")
"""


def run(config: Config, name: str, *, stage: int, source: str = "", stop_at: int = 0) -> None:
    """A run beside that of `config`, from its start or from the checkpoint of the run `source`, which is saved again
    as soon as it is loaded."""
    folder = Path(config.output).parent
    zero = {"stage": stage} | (THRESHOLD if stage == 3 else {})
    config = dataclasses.replace(config, output=str(folder / name), deepspeed={"zero_optimization": zero})
    checkpoint = find_checkpoint(folder / source) if source else None
    data = open_source(config.data.train)
    start_distributed()
    trainer = Trainer(config, data, prepare_run(config, data, checkpoint), checkpoint=checkpoint)
    if source:
        trainer._save()
    if stop_at:
        step = trainer._step
        trainer._step = lambda batches: (step(batches)[0], trainer.progress.step == stop_at)
    trainer.run()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Runs one-0 (to the end), one-1, two-1 and two-3 (to step 2), and those that resume on the other world size."""
    folder = tmp_path_factory.mktemp("resharding")
    config = make_config(folder, *OVERRIDES)
    save_config(config, folder / "config.yaml")
    run(config, "one-0", stage=0)
    run(config, "one-1", stage=1, stop_at=2)
    (folder / "worker.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{WORKER}")
    run_on_two_ranks(folder / "worker.py", str(folder / "config.yaml"))
    run(config, "two-1-on-one", stage=0, source="two-1")
    run(config, "two-3-on-one", stage=2, source="two-3")
    return folder


def contents(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights, momentum encoder, queue, buffers and moments by name, of a checkpoint of any kind."""
    model, _, config = load_model(checkpoint)
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[p] for group in parameter_groups(model, config.optimizer) for p in group["params"]]
    saved = SavedState(checkpoint)
    found = {f"{key} {name}": pieces.whole() for key in MOMENTS for name, pieces in saved.moments(key, order).items()}
    return found | model.state_dict() | {"step": torch.tensor(saved.step())}


@pytest.mark.parametrize(("before", "after"), [("two-1", "one"), ("two-3", "one"), ("one-1", "two")])
def test_checkpoint_resumes_at_another_stage_and_number_of_ranks(folder, before: str, after: str) -> None:
    run = folder / f"{before}-on-{after}"
    old, new = find_checkpoint(folder / before), find_checkpoint(run / "checkpoints" / "step_00000002")
    expected, loaded = contents(old), contents(new)
    assert expected.keys() == loaded.keys() and len(expected) > 500
    assert [name for name in expected if not torch.equal(expected[name], loaded[name])] == []
    assert all(expected[f"{key} temperature"].abs().sum() > 0 for key in MOMENTS)
    states = [json.loads((checkpoint / "trainer.json").read_text()) for checkpoint in (old, new)]
    assert {state.pop("world_size") for state in states} == {1, 2} and states[0] == states[1]
    assert SavedState(old).model["lr_scheduler"] == SavedState(new).model["lr_scheduler"]
    assert_rows_close(rows(run), rows(folder / "one-0")[2:])


def test_evaluation_loads_stage_3_checkpoints(folder) -> None:
    """The weights of one rank at stage 1 and of two ranks at stage 3, after the same training."""
    one, two = (load_model(folder / name)[0].state_dict() for name in ("one-1", "two-3"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


def test_resuming_must_keep_the_global_batch_size(folder) -> None:
    checkpoint = find_checkpoint(folder / "two-3")
    config = load_config(checkpoint / "config.yaml")
    check_resumable(checkpoint, config, world_size=2)
    with pytest.raises(CheckpointError, match=r"number of ranks \(was 2, now 1\), .* ranks \(was 8, now 4; the order"):
        check_resumable(checkpoint, config, world_size=1)
    config.train.batch_size = 8
    check_resumable(checkpoint, config, world_size=1)
    with pytest.raises(CheckpointError, match=r"configuration: train.batch_size \(was 4, now 8\)$"):
        check_resumable(checkpoint, config, world_size=2)


def test_missing_file_of_a_checkpoint_is_named(folder, tmp_path) -> None:
    checkpoint = tmp_path / "step_00000002"
    checkpoint.mkdir()
    for path in find_checkpoint(folder / "two-3").iterdir():
        if "zero_pp_rank_1" not in path.name:
            (checkpoint / path.name).symlink_to(path)
    with pytest.raises(CheckpointError, match="step_00000002: cannot be read: .*zero_pp_rank_1_mp_rank_00"):
        load_model(checkpoint)
