"""benchmarks/bench_step.py at a small size: the engine's losses and gradients are those of the plain recipe."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from train_fixtures import make_config

from softmask.train.config import save_config

OVERRIDES = ["model.text.vocab_size=200", "model.text.fusion_layers=3", "model.cam_layer=1", "model.gamma=2"]


@pytest.fixture
def case(tmp_path: Path):
    """(model, batch, draws)"""
    import step_cases

    config = make_config(tmp_path, *OVERRIDES, data=tmp_path / "none.tar")
    save_config(config, tmp_path / "config.yaml")
    model = step_cases.make_model(tmp_path / "config.yaml")
    batch = step_cases.make_batch(model, 6)
    return model, batch, step_cases.draw(model, batch)


@pytest.fixture(autouse=True)
def written_data(tmp_path: Path) -> None:
    (tmp_path / "none.tar").touch()


def test_every_loss_and_gradient_is_the_plain_recipes(case) -> None:
    import bench_step

    assert "within the error budget" in bench_step.check_values(*case)


def test_a_wrong_gradient_is_found(case, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_step

    values = bench_step.values

    def wrong(name: str, *arguments):
        found = values(name, *arguments)
        if name == "engine":
            found["gradient itm_head"] *= 1 + 1e-5
        return found

    monkeypatch.setattr(bench_step, "values", wrong)
    with pytest.raises(AssertionError, match="gradient itm_head: error .* of what is allowed"):
        bench_step.check_values(*case)


def test_time_memory_and_products_are_reported(case) -> None:
    import bench_step

    model, batch, draws = case
    before = {name: value.clone() for name, value in model.named_parameters()}
    sides = {name: make(copy.deepcopy(model), batch, draws) for name, make in bench_step.SIDES.items()}
    steppers = {name: bench_step.Stepper(side, bf16=False) for name, side in sides.items()}
    text = "\n".join(bench_step.measure(steppers, turns=1).lines())
    assert "all but the image encoder" in text and "x faster" in text
    for name, value in steppers["engine"].side.model.named_parameters():
        assert name.startswith("twin.") or torch.equal(value, before[name]), "steps at a rate of 0 leave the weights"
    plain, ours = (bench_step.products(sides[name]) for name in ("plain", "engine"))
    assert ours["image encoder"] == plain["image encoder"] and ours["all others"] < plain["all others"]
