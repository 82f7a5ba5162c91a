"""Questions and answers that are cut are counted: at a run's start, in its validations and in evaluation."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from softmask.evaluation import evaluate
from softmask.training.config import Config
from tests.support.task_fixtures import finetune_here, pretrained, task_config, write_snli_ve, write_vqa

LONG = "a red box on a green paper beside a blue box"  # 11 words
METHODS = ("softmask_pp", "sycoca")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {method: pretrained(tmp_path_factory.mktemp(method), method=method) for method in METHODS}


def vqa_with_long_texts(path: Path) -> Path:
    """Two long questions, and two long answers, one of them in two questions."""
    entries = json.loads(write_vqa(path).read_text())
    for number in (3, 7):
        entries[number]["question"] = f"{LONG} or {LONG}"
        entries[number]["answer"] = [LONG] * 10
    entries[9]["answer"][0] = f"{LONG} too"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def different_answers(path: Path) -> set[str]:
    given = [entry["answer"] for entry in json.loads(path.read_text())]
    return {text for answer in given for text in ([answer] if isinstance(answer, str) else answer)}


def make(folder: Path, task: str, data: Path, *overrides: str, init: Path) -> Config:
    given = ("data.max_length=10", "train.steps=2", "train.validate_every=1", f"data.val={data}")
    return task_config(folder, task, data, *given, *overrides, init=init)


@pytest.mark.parametrize("method", METHODS)
def test_cut_answers_and_questions_are_counted(
    method: str, tmp_path: Path, runs: dict[str, Path], capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "softmask.data")
    data = vqa_with_long_texts(tmp_path / "pictures" / "vqa.json")
    config = make(tmp_path, "vqa", data, "head.answer_length=8", init=runs[method])
    finetune_here(config)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("text  ")]
    assert "10 tokens at most, which cuts 2 of the first 24 texts" in line
    count = len(different_answers(data))
    assert f"answers 8 tokens at most, which cuts 2 of {count} different ones, such as '{LONG}'" in line
    said = [record.getMessage() for record in caplog.records]
    assert said.count("data.val: 2 texts have more than data.max_length=10 tokens and are cut") == 1
    assert said.count("data.val: 2 answers have more than head.answer_length=8 tokens") == 1
    assert evaluate.main([config.output, "--data", str(data)]) == 0
    found = json.loads((Path(config.output) / "metrics.json").read_text())["vqa"]
    assert (found["cut"], found["too_long"]) == (2, 2)
    printed = capfd.readouterr().out
    assert "2 questions were truncated to 10 tokens" in printed
    assert "2 true answers have more than head.answer_length=8 tokens" in printed


def test_texts_that_fit_are_not_mentioned(
    tmp_path: Path, runs: dict[str, Path], capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_vqa(tmp_path / "pictures" / "vqa.json")
    config = make(tmp_path, "vqa", data, init=runs["softmask_pp"])
    finetune_here(config)
    assert "answers 10 tokens at most, which cuts 0 of " in capfd.readouterr().err
    assert not [record for record in caplog.records if "tokens" in record.getMessage()]
    assert evaluate.main([config.output, "--data", str(data)]) == 0
    found = json.loads((Path(config.output) / "metrics.json").read_text())["vqa"]
    assert not {"cut", "too_long"} & found.keys() and "truncated" not in capfd.readouterr().out


def test_cut_sentences_are_counted(tmp_path: Path, runs: dict[str, Path], capfd: pytest.CaptureFixture) -> None:
    data = write_snli_ve(tmp_path / "pictures" / "snli_ve.json")
    entries = json.loads(data.read_text())
    entries[4]["sentence"] = f"{LONG} or {LONG}"
    data.write_text(json.dumps(entries), encoding="utf-8")
    config = make(tmp_path, "snli_ve", data, init=runs["softmask_pp"])
    finetune_here(config)
    assert evaluate.main([config.output, "--data", str(data)]) == 0
    assert json.loads((Path(config.output) / "metrics.json").read_text())["snli_ve"]["cut"] == 1
    assert "1 sentences were truncated to 10 tokens" in capfd.readouterr().out
