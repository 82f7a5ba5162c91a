"""Tasks of SoftMask++ after pre-training: fine-tuned from a run, resumed, validated and evaluated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from softmask.data import DataError
from softmask.evaluation import evaluate
from softmask.finetuning import finetune
from softmask.report import build
from softmask.training import pretrain
from softmask.training.checkpoint.store import best_checkpoint, complete_checkpoints, find_checkpoint, load_model
from softmask.training.config import Config, save_config
from tests.support.task_fixtures import WRITERS, finetune_here, pretrained, task_config
from tests.support.train_fixtures import ROOT, different, rows, run_on_ranks, saved_state

TASKS = tuple(WRITERS)


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained(tmp_path_factory.mktemp("pretrained"))


def make(folder: Path, task: str, *overrides: str, init: Path) -> Config:
    data = folder / "pictures" / f"{task}.json"
    if not data.exists():
        data.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[task](data)
    listed = (f"head.answer_list={data.parent / 'answer_list.json'}",) if task == "vqa" else ()
    return task_config(folder, task, data, *listed, *overrides, init=init)


def evaluated(run: Path, data: str | Path, *options: str) -> dict[str, Any]:
    assert evaluate.main([str(run), "--data", str(data), *options]) == 0
    return json.loads((run / "metrics.json").read_text())


@pytest.mark.parametrize("task", TASKS)
def test_task_starts_from_a_pretrained_run_and_is_evaluated(
    task: str, tmp_path: Path, init: Path, capfd: pytest.CaptureFixture
) -> None:
    config = make(tmp_path, task, "train.steps=2", init=init)
    finetune_here(config)
    line = next(line for line in capfd.readouterr().err.splitlines() if line.startswith("weights"))
    for part in ("backbone.image_projection", "contrast.image_queue", "itm_head.weight", "momentum_encoder.mlm_head"):
        assert f"{part} left out" in line
    assert ("backbone.head new" in line) == (task != "vqa") and "backbone.fusion" not in line
    assert [row["step"] for row in rows(config.output)] == [1, 2]
    found = evaluated(Path(config.output), config.data.train, "--predictions", str(tmp_path / "predictions.json"))
    assert found[task]["samples"] == 24 and 0 <= found[task]["accuracy"] <= 1
    assert len(json.loads((tmp_path / "predictions.json").read_text())) == 24


@pytest.mark.parametrize("task", TASKS)
def test_first_weights_are_the_pretrained_ones(task: str, tmp_path: Path, init: Path) -> None:
    config = make(tmp_path, task, "train.steps=1", "optimizer.lr=1e-30", "optimizer.min_lr=0", init=init)
    finetune_here(config)
    given, own = (dict(load_model(run)[0].named_parameters()) for run in (init, config.output))
    shared = [name for name in given if name.startswith(("backbone.vision.", "backbone.text."))]
    assert len(shared) > 20 and all(torch.allclose(own[name], given[name], atol=1e-6) for name in shared)
    for name, tensor in given.items():
        if name.startswith("backbone.fusion.layers.1."):
            part = name.removeprefix("backbone.fusion.layers.1.")
            copies = {
                "snli_ve": [f"backbone.fusion.layers.1.{part}"],
                "nlvr2": [f"backbone.fusion.layers.{number}.{part}" for number in (2, 3)],
                "vqa": [f"backbone.{start}fusion.layers.1.{part}" for start in ("", "decoder.")],
            }[task]
            if task == "nlvr2" and part.startswith(("cross_attention.key", "cross_attention.value.")):
                assert copies.pop() not in own
            assert all(torch.allclose(own[copy], tensor, atol=1e-6) for copy in copies), name


@pytest.mark.parametrize("task", TASKS)
def test_resumed_run_equals_an_uninterrupted_one(task: str, tmp_path: Path, init: Path) -> None:
    validated = ("train.validate_every=2", f"data.val={tmp_path / 'pictures' / f'{task}.json'}")
    config = make(tmp_path, task, *validated, init=init)
    finetune_here(config)
    other = make(tmp_path, task, *validated, f"output={tmp_path / 'resumed'}", "train.checkpoint_every=1", init=init)
    other.train.keep_checkpoints = 9
    finetune_here(other)
    resumed = make(tmp_path, task, *validated, f"output={tmp_path / 'again'}", init=init)
    finetune_here(resumed, checkpoint=Path(other.output) / "checkpoints" / "step_00000002")
    assert different(saved_state(Path(config.output)), saved_state(Path(resumed.output))) == []
    states = [json.loads((find_checkpoint(one.output) / "trainer.json").read_text()) for one in (config, resumed)]
    assert states[0]["validation"] == states[1]["validation"] != {}


@pytest.mark.parametrize("task, ranks", [("snli_ve", [2]), ("nlvr2", [2]), ("vqa", [2, 3])])
def test_figures_are_the_same_on_any_number_of_ranks(task: str, ranks: list[int], tmp_path: Path, init: Path) -> None:
    config = make(tmp_path, task, "train.steps=1", init=init)
    data = Path(config.data.train)
    broken = json.loads(data.read_text())
    broken[5]["images" if task == "nlvr2" else "image"] = ["missing.png"] * 2 if task == "nlvr2" else "missing.png"
    finetune_here(config)
    data.write_text(json.dumps(broken))
    found = []
    for count in (1, *ranks):
        output, predictions = tmp_path / f"{count}.json", tmp_path / f"{count}.predictions.json"
        options = ("--data", str(data), "--batch-size", "5", "--output", str(output), "--predictions", str(predictions))
        if count == 1:
            assert evaluate.main([config.output, *options]) == 0
        else:
            run_on_ranks(count, ROOT / "train" / "evaluate.py", config.output, *options)
        found.append((json.loads(output.read_text())[task], json.loads(predictions.read_text())))
    assert all(one == found[0] for one in found) and found[0][0]["samples"] == 23
    assert len(found[0][1]) == (24 if task == "vqa" else 23)


@pytest.mark.parametrize("task", ["snli_ve", "vqa"])
def test_partitioned_models_are_measured_whole(task: str, tmp_path: Path, init: Path) -> None:
    """ZeRO stage 3 on two ranks, of which one measures more batches than the other."""
    options = ("train.steps=2", "train.batch_size=5", "deepspeed.zero_optimization.stage=3")
    kept = "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
    validated = ("train.validate_every=1", f"data.val={tmp_path / 'pictures' / f'{task}.json'}")
    config = make(tmp_path, task, *options, kept, *validated, init=init)
    save_config(config, tmp_path / "config.yaml")
    run_on_ranks(2, ROOT / "train" / "finetune.py", "--config", str(tmp_path / "config.yaml"))
    scores = [event["score"] for event in rows(config.output, "events.jsonl")]
    last = find_checkpoint(config.output)
    assert (
        evaluate.main([str(last), "--data", config.data.val, "--batch-size", "5", "--output", str(tmp_path / "m.json")])
        == 0
    )
    assert len(scores) == 2 and json.loads((tmp_path / "m.json").read_text())[task]["accuracy"] == scores[1]
    if task == "snli_ve":
        again = make(tmp_path, task, *options, kept, f"output={tmp_path / 'other'}", init=init)
        save_config(again, tmp_path / "again.yaml")
        run_on_ranks(2, ROOT / "train" / "finetune.py", "--config", str(tmp_path / "again.yaml"))
        losses = [[row["loss"] for row in rows(one.output)] for one in (config, again)]
        assert losses[0] == losses[1], "measuring changes training"


class Scripted:
    """Measures scores that are known beforehand."""

    def __init__(self, scores: Iterator[float]) -> None:
        self.scores = scores

    def check(self, tokenizer: object) -> None: ...

    def __call__(self, *_: object) -> dict[str, float]:
        return {"accuracy": next(self.scores)}


def test_best_checkpoint_is_kept_and_evaluated(tmp_path: Path, init: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter((0.4, 0.7, 0.5, 0.6))
    config = make(
        tmp_path, "snli_ve", "train.validate_every=1", "train.keep_checkpoints=1", "data.val=pictures.json", init=init
    )
    monkeypatch.setattr(finetune, "validator", lambda _config: Scripted(scores))
    finetune_here(config)
    states = [json.loads((one / "trainer.json").read_text()) for one in complete_checkpoints(Path(config.output))]
    assert [state["validation"]["best_step"] for state in states] == [2, 2]
    kept = [path.name for path in complete_checkpoints(Path(config.output))]
    assert kept == ["step_00000002", "step_00000004"]
    assert best_checkpoint(config.output).name == "step_00000002" and find_checkpoint(config.output).name == kept[1]
    assert best_checkpoint(Path(config.output) / "checkpoints" / kept[1]).name == kept[1]
    assert [row["score"] for row in rows(config.output, "events.jsonl")] == [0.4, 0.7, 0.5, 0.6]


def test_run_ends_early_without_gain(tmp_path: Path, init: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("train.steps=9", "train.validate_every=1", "train.patience=2", "data.val=pictures.json")
    config = make(tmp_path, "snli_ve", *options, init=init)
    scores = iter((0.5, 0.5, 0.4, 0.9))
    monkeypatch.setattr(finetune, "validator", lambda _config: Scripted(scores))
    finetune_here(config)
    assert json.loads((Path(config.output) / "done.json").read_text())["steps"] == 3


@pytest.mark.parametrize("program, task, words", [
    (pretrain, "snli_ve", "task: expected pretrain, got snli_ve: use train/finetune.py"),
    (finetune, "pretrain", "use train/pretrain.py"),
])  # fmt: skip
def test_programs_refuse_each_others_configurations(
    program: Any, task: str, words: str, tmp_path: Path, init: Path, capfd: pytest.CaptureFixture
) -> None:
    config = make(tmp_path, "snli_ve", init=init)
    save_config(config, tmp_path / "own.yaml")
    overrides = [f"task={task}"] + (["head={}"] if task == "pretrain" else [])
    assert program.main(["--config", str(tmp_path / "own.yaml"), *overrides]) == 2
    assert words in capfd.readouterr().err


def test_pictures_that_validation_cannot_read_are_named_and_too_many_end_the_run(
    tmp_path: Path, init: Path, caplog: pytest.LogCaptureFixture
) -> None:
    val = tmp_path / "val" / "val.json"
    val.parent.mkdir()
    WRITERS["snli_ve"](val, count=40)
    (val.parent / "3.png").unlink()
    config = make(tmp_path, "snli_ve", "train.steps=1", f"data.val={val}", "data.max_bad_share=0.2", init=init)
    finetune_here(config)
    assert "data.val: 1 of 40 cannot be read, such as" in caplog.text and "3.png" in caplog.text
    for number in range(40):
        (val.parent / f"{number}.png").unlink(missing_ok=True)
    config.output = str(tmp_path / "none")
    with pytest.raises(DataError, match="no example can be read; the first: .*0.png: cannot be read"):
        finetune_here(config)
    assert find_checkpoint(config.output).name == "step_00000001"  # what was trained is kept


def test_answers_that_cannot_be_told_apart_are_refused(
    tmp_path: Path, init: Path, capfd: pytest.CaptureFixture
) -> None:
    config = make(tmp_path, "vqa", "train.steps=1", init=init)
    finetune_here(config)
    listed = tmp_path / "answers.json"
    for answers, words in (
        (["red", "green", "red "], "reads 'red' and 'red ' as the same tokens"),
        (["red", "green box on white paper " * 3], "1 answers have more than head.answer_length=10 tokens"),
    ):
        listed.write_text(json.dumps(answers))
        assert evaluate.main([config.output, "--data", config.data.train, "--answer-list", str(listed)]) == 1
        assert words in capfd.readouterr().err


@pytest.mark.parametrize("options, words", [
    (["--task", "pretrain"], "--task: expected captioning, classification, grounding, nlvr2, retrieval, snli_ve, text"),
    (["--answer-list", "x.json"], "--answer-list: expected a run of task vqa, got pretrain"),
])  # fmt: skip
def test_options_that_would_be_ignored_are_refused(
    options: list[str], words: str, init: Path, capfd: pytest.CaptureFixture
) -> None:
    assert evaluate.main([str(init), "--data", str(init.parent / "train.tar"), *options]) == 1
    assert words in capfd.readouterr().err


def test_a_run_trained_on_grey_pictures_is_evaluated_on_them_and_says_so(tmp_path: Path, init: Path) -> None:
    config = make(tmp_path, "snli_ve", "train.steps=1", "data.blank=true", init=init)
    finetune_here(config)
    found = evaluated(Path(config.output), config.data.train)
    assert found["evaluation"]["blank"] is True
    assert build.main([config.output, "--data", config.data.train]) == 0
    page = (Path(config.output) / "report.html").read_text()
    assert "grey, in training and evaluation" in page


def test_several_files_with_commas_between_them(tmp_path: Path, init: Path) -> None:
    config = make(tmp_path, "snli_ve", "train.steps=1", init=init)
    finetune_here(config)
    entries = json.loads(Path(config.data.train).read_text())
    paths = [Path(config.data.train).with_name(name) for name in ("first.json", "second.json")]
    for path, some in zip(paths, (entries[:10], entries[10:]), strict=True):
        path.write_text(json.dumps(some))
    together = evaluated(Path(config.output), ",".join(map(str, paths)))["snli_ve"]
    assert together == evaluated(Path(config.output), config.data.train)["snli_ve"]
    assert build.main([config.output, "--data", config.data.train]) == 0
