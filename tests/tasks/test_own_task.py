"""A task of a user's own package is trained, evaluated and reported without changes to softmask."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from softmask.evaluation import evaluate
from softmask.evaluation.sections import find_section, sections_of
from softmask.report import build as report
from softmask.tasks.registry import find_task, known
from softmask.training.checkpoint.store import find_checkpoint, load_model
from softmask.training.config import Config, ConfigError, load_config, save_config
from tests.support.evaluation_files import write_scenes
from tests.support.own_task import TwoEncoders
from tests.support.train_fixtures import run_here

CONFIG = """
output: {folder}/run
method: tests.support.own_task:TwoEncodersTask
model:
  vision: {{name: conv_vit, image_size: 32, conv_vit: {{patch_size: 8, width: 24, depth: 1, heads: 2, stem_width: 4}}}}
  text: {{width: 16, heads: 2, layers: 1, max_positions: 32}}
data: {{train: {data}, image_size: 32, max_length: 16, distort: false, vocab_size: 64}}
train: {{steps: 2, batch_size: 4, log_every: 1}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = tmp_path / "own.yaml"
    path.write_text(CONFIG.format(folder=tmp_path, data=write_scenes(tmp_path / "test.tar")), encoding="utf-8")
    return load_config(path)


def test_own_task_is_trained_evaluated_and_reported(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    trainer = run_here(config)
    assert isinstance(trainer.model, TwoEncoders) and trainer.finished
    rows = [json.loads(line) for line in (Path(config.output) / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and all(row["contrast"] == row["loss"] for row in rows)
    model, _, loaded = load_model(find_checkpoint(config.output))
    assert isinstance(model, TwoEncoders) and loaded == config and loaded.data.eval_resize == "squash"
    capsys.readouterr()
    command = [config.output, "--data", str(tmp_path / "test.tar")]
    assert evaluate.main(command) == 0
    result = json.loads((Path(config.output) / "metrics.json").read_text())
    assert list(result) == ["retrieval", "brightness", "training", "evaluation"]
    assert "itm" not in result["retrieval"] and result["brightness"]["samples"] == 12
    assert f"mean level of 12 images: {result['brightness']['level']:.1f}" in capsys.readouterr().out
    assert report.main(command) == 0
    page = (Path(config.output) / "report.html").read_text()
    for text in ("Two encoders", "Two encoders: contrast", "Width of features", "what it finds"):
        assert text in page


def test_bad_names_of_tasks_and_sections_are_refused(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {"softmask_pp", "sycoca"} <= set(known())
    for name, message in (
        ("coca", "method: expected softmask_pp, sycoca or module:Class of a task of your own, got 'coca'"),
        ("no.such:Task", "method: no.such:Task cannot be imported (No module named 'no')"),
        ("tests.support.own_task:Nothing", "cannot be imported (module 'tests.support.own_task' has no attribute"),
        ("tests.support.own_task:NoTask", "method: expected a subclass of softmask.tasks.base.Task, got tests.support"),
    ):
        with pytest.raises(ValueError) as error:
            find_task(name)
        assert message in str(error.value)
        save_config(config, tmp_path / "config.yaml")
        with pytest.raises(ConfigError) as error:
            load_config(tmp_path / "config.yaml", [f"method={name}"])
        assert message in str(error.value)
    for name, message in (
        (
            "nothing",
            "expected retrieval, grounding, captioning, reconstruction, zero_shot or module:Class, got 'nothing'",
        ),
        ("no.such:Section", "cannot be imported"),
        ("tests.support.own_task:NoTask", "expected a subclass of softmask.evaluation.sections.Section"),
    ):
        with pytest.raises(ValueError, match="evaluation section") as error:
            find_section(name)
        assert message in str(error.value)
    monkeypatch.setattr(type(config.find_task()), "sections", lambda *_: ("nothing",))
    with pytest.raises(ConfigError, match="own_task:TwoEncodersTask: evaluation section: expected retrieval"):
        sections_of(SimpleNamespace(config=config))
