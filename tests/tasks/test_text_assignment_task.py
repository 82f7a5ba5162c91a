"""Text assignment, and NLVR2 that starts from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from softmask.evaluation import evaluate
from softmask.training.checkpoint.store import load_model
from tests.support.task_fixtures import finetune_here, pretrained, task_config, write_nlvr2
from tests.support.train_fixtures import rows

TASK = "text_assignment"


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained(tmp_path_factory.mktemp("pretrained"))


def test_text_assignment_comes_before_nlvr2(tmp_path: Path, init: Path, capfd: pytest.CaptureFixture) -> None:
    captions = load_model(init)[2].data.train
    first = task_config(tmp_path, TASK, captions, "train.steps=2", f"data.val={captions}", init=init)
    finetune_here(first)
    lines = capfd.readouterr().err.splitlines()
    weights = next(line for line in lines if line.startswith("weights"))
    assert "backbone.assignment new" in weights and "itm_head.weight left out" in weights
    assert any(line.startswith("validation: accuracy") for line in lines)
    assert {"accuracy", "loss"} <= rows(first.output)[-1].keys()

    assert evaluate.main([first.output, "--data", captions]) == 0
    found = json.loads((Path(first.output) / "metrics.json").read_text())[TASK]
    assert found["labels"] == ["left", "right", "neither"] and 0 <= found["accuracy"] <= 1
    assert sum(map(sum, found["confusion"])) == found["samples"]

    data = tmp_path / "pictures" / "nlvr2.json"
    data.parent.mkdir()
    options = ("train.steps=1", "optimizer.lr=1e-30", "optimizer.min_lr=0")
    second = task_config(tmp_path, "nlvr2", write_nlvr2(data), *options, init=Path(first.output))
    finetune_here(second)
    weights = next(line for line in capfd.readouterr().err.splitlines() if line.startswith("weights"))
    assert "backbone.head new" in weights and "backbone.assignment left out" in weights
    given, own = (dict(load_model(run)[0].named_parameters()) for run in (first.output, second.output))
    shared = [name for name in own if ".head." not in name and not name.startswith("momentum_encoder.")]
    assert any("fusion.layers.3" in name for name in shared)
    for name in shared:
        assert torch.allclose(own[name], given[name], atol=1e-6), name


def test_wrong_pictures_follow_the_pretrained_projections(tmp_path: Path, init: Path) -> None:
    captions = load_model(init)[2].data.train
    run = task_config(tmp_path, TASK, captions, "train.steps=2", init=init)
    finetune_here(run)
    given, own = (dict(load_model(folder)[0].named_parameters()) for folder in (init, run.output))
    kept = [name for name in own if "_projection." in name]
    assert len(kept) == 4
    for name in kept:
        assert torch.equal(own[name], given[name]), name
