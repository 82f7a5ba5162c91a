"""Checkpoints with the parameter names of earlier releases, and `init` from a model with other heads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from softmask.tasks.registry import find_task
from softmask.training.checkpoint.reshard import SavedState
from softmask.training.checkpoint.state import CheckpointError
from softmask.training.checkpoint.store import find_checkpoint, load_model
from softmask.training.config import Config, ConfigError, load_config, save_config
from softmask.training.optim import groups_digest
from softmask.training.trainer import Trainer
from tests.support.train_fixtures import make_config, make_sycoca_config, make_trainer, rows, run_here, weights

SCALES = "optimizer.lr_scales={vision.vit: 2, text_projection: 3, caption_head: 4}"
EARLIER = {
    "softmask_pp": ["twin.vision.vit.norm.weight", "backbone.vision.vit.norm.weight"],
    "sycoca": ["twin.text.word.weight", "vision.vit.norm.weight", "image_projection.weight", "caption_head.weight"],
}


def renamed(node: Any, method: str) -> Any:
    """A DeepSpeed file with the parameter names of an earlier release."""
    earlier = find_task(method).earlier_name
    if isinstance(node, dict):
        return type(node)((earlier(k) if isinstance(k, str) else k, renamed(v, method)) for k, v in node.items())
    if isinstance(node, list | tuple) and type(node) in (list, tuple):
        return type(node)(renamed(entry, method) for entry in node)
    return earlier(node) if isinstance(node, str) else node


def make_earlier(checkpoint: Path, trainer: Trainer) -> None:
    """Rewrite a checkpoint as an earlier release wrote it."""
    config = trainer.config
    for file in checkpoint.glob("*.pt"):
        torch.save(renamed(torch.load(file, weights_only=False), config.method), file)
    state = json.loads((checkpoint / "trainer.json").read_text())
    state["groups"] = groups_digest(trainer.model, config.optimizer, name_of=config.find_task().earlier_name)
    (checkpoint / "trainer.json").write_text(json.dumps(state))
    text = (checkpoint / "config.yaml").read_text()
    (checkpoint / "config.yaml").write_text(text.replace("backbone.", "") if config.method == "sycoca" else text)


def config_of(method: str, folder: Path, name: str, *options: str) -> Config:
    if method == "sycoca":
        return make_sycoca_config(folder, name, "model.queue_size=32", SCALES, *options)
    return dataclasses.replace(make_config(folder, "train.steps=4", *options), output=str(folder / name))


def stop_at_two(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer._step

    def stopping(self: Trainer, batches: Any) -> Any:
        outputs, stop = step(self, batches)
        return outputs, stop or self.progress.step == 2

    monkeypatch.setattr(Trainer, "_step", stopping)


@pytest.mark.parametrize(
    ("stage", "method"),
    [
        (0, "softmask_pp"),
        (1, "softmask_pp"),
        pytest.param(3, "softmask_pp", marks=pytest.mark.slow),
        pytest.param(0, "sycoca", marks=pytest.mark.slow),
        (1, "sycoca"),
        (3, "sycoca"),
    ],
)
def test_run_of_an_earlier_release_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, stage: int
) -> None:
    options = (f"deepspeed.zero_optimization.stage={stage}",)
    whole = run_here(config_of(method, tmp_path, "whole", *options))
    halves = config_of(method, tmp_path, "halves", *options)
    with monkeypatch.context() as patched:
        stop_at_two(patched)
        stopped = run_here(halves)
    checkpoint = find_checkpoint(halves.output)
    before = load_model(checkpoint)[0].state_dict()
    make_earlier(checkpoint, stopped)
    saved = SavedState(checkpoint)
    assert saved.has_earlier_names and set(EARLIER[method]) <= saved._weights().keys()
    after = load_model(checkpoint)[0].state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    resumed = run_here(halves, checkpoint=checkpoint)
    assert [row["loss"] for row in rows(halves.output)] == [row["loss"] for row in rows(whole.config.output)]
    expected, got = weights(whole), weights(resumed)
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


def test_earlier_parameter_names_in_a_configuration_are_converted(tmp_path: Path) -> None:
    config = make_sycoca_config(tmp_path, "run", SCALES)
    assert config.optimizer.lr_scales == {"backbone.vision.vit": 2, "backbone.text_projection": 3, "caption_head": 4}
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = make_config(tmp_path_factory.mktemp("heads"), "train.steps=1")
    run_here(config)
    return config


def start_from_first(first: Config, folder: Path, *options: str) -> tuple[Trainer, dict[str, torch.Tensor]]:
    """A trainer that starts from the first run, and that run's weights."""
    data = Path(first.output).parent / "train.tar"
    trainer = make_trainer(make_config(folder, f"init={first.output}", *options, data=data))
    return trainer, load_model(first.output)[0].state_dict()


def test_heads_named_by_init_heads_start_afresh(first: Config, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    wider = ("model.embed_dim=24", "init_heads=[backbone.image_projection, backbone.text_projection]")
    trainer, given = start_from_first(first, tmp_path, *wider)
    line = next(line for line in capfd.readouterr().err.splitlines() if line.startswith("weights"))
    for name in ("backbone.image_projection", "momentum_encoder.text_projection", "contrast.image_queue"):
        assert f"{name} new" in line
    own = trainer.model.state_dict()
    new = {name for name in own if own[name].shape != given[name].shape or not torch.equal(own[name], given[name])}
    assert {name.split(".")[1] for name in new} == {
        "image_projection", "text_projection", "image_queue", "text_queue", "queue_ids"
    }  # fmt: skip
    for name in new - {name for name in new if name.startswith("contrast")}:
        if name.startswith("momentum_encoder."):
            assert torch.equal(own[name], own[name.replace("momentum_encoder.", "backbone.")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["model.embed_dim=24"],
            r"backbone.image_projection.bias has shape \(16,\), expected \(24,\); init_heads names",
        ),
        (["init_heads=[itm_haed]"], "init_heads: no parameter's name starts with 'itm_haed', but with backbone.fusion"),
    ],
)
def test_mismatched_and_misspelt_heads_are_refused(
    first: Config, tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        start_from_first(first, tmp_path, *options)


def test_init_heads_needs_init(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="init_heads: expected nothing without init, got"):
        make_config(tmp_path, "init_heads=[itm_head]")
