"""VQA of SyCoCa: fine-tuned from a pre-trained run, resumed, evaluated on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from softmask.evaluation import evaluate
from softmask.finetuning import finetune
from softmask.training.checkpoint.store import load_model
from softmask.training.config import Config, ConfigError, save_config
from tests.support.task_fixtures import finetune_here, pretrained, task_config, write_vqa
from tests.support.train_fixtures import ROOT, different, rows, run_on_ranks, saved_state

STARTS = {
    "backbone.vision.": "backbone.vision.",
    "backbone.text.": "backbone.text.",
    "caption_decoder.": "backbone.caption_decoder.",
    "caption_head.": "backbone.caption_head.",
}


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained(tmp_path_factory.mktemp("pretrained"), method="sycoca")


def make(folder: Path, *overrides: str, init: Path) -> Config:
    data = folder / "pictures" / "vqa.json"
    if not data.exists():
        write_vqa(data)
    given = ("data.max_length=10", "head.answer_length=8", f"head.answer_list={data.parent / 'answer_list.json'}")
    return task_config(folder, "vqa", data, *given, *overrides, init=init)


def evaluated(config: Config, *options: str) -> dict[str, Any]:
    assert evaluate.main([config.output, "--data", config.data.train, *options]) == 0
    return json.loads((Path(config.output) / "metrics.json").read_text())["vqa"]


def test_task_starts_from_a_pretrained_run_and_is_evaluated(
    tmp_path: Path, init: Path, capfd: pytest.CaptureFixture
) -> None:
    config = make(tmp_path, "train.steps=30", "train.log_every=30", f"data.val={tmp_path}/pictures/vqa.json", init=init)
    assert config.method == "sycoca"
    finetune_here(config)
    line = next(line for line in capfd.readouterr().err.splitlines() if line.startswith("weights"))
    for part in (
        "backbone.image_projection",
        "backbone.text_projection",
        "image_decoder.",
        "pixel_head",
        "logit_scale",
    ):
        assert f"{part}" in line and " new" not in line
    assert "caption_decoder" not in line and "caption_head" not in line
    found = evaluated(config, "--predictions", str(tmp_path / "predictions.json"))
    assert found["samples"] == 24 and found["accuracy"] > 0
    answers = json.loads((tmp_path / "pictures" / "answer_list.json").read_text())
    assert {row["answer"] for row in json.loads((tmp_path / "predictions.json").read_text())} <= set(answers)
    assert evaluated(config, "--blank")["samples"] == 24
    save = (config.output, config.head.answer_list)
    config.head.answer_list = ""
    for folder in (Path(save[0]), *Path(save[0]).glob("checkpoints/*")):
        save_config(config, folder / "config.yaml")
    assert evaluated(config)["samples"] == 24, "without a list it writes the answers"


def test_loss_falls(tmp_path: Path, init: Path) -> None:
    config = make(tmp_path, "train.steps=40", "head.alpha=0", "optimizer.lr=3e-3", init=init)
    finetune_here(config)
    losses = [row["loss"] for row in rows(config.output)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_first_weights_are_the_pretrained_ones(tmp_path: Path, init: Path) -> None:
    config = make(tmp_path, "train.steps=1", "optimizer.lr=1e-30", "optimizer.min_lr=0", init=init)
    finetune_here(config)
    given, own = (dict(load_model(run)[0].named_parameters()) for run in (init, config.output))
    shared = {
        name: name.replace(start, new, 1) for start, new in STARTS.items() for name in given if name.startswith(start)
    }
    assert {name for name in own if name.startswith("backbone.")} == set(shared.values())
    for name, new in shared.items():
        assert torch.allclose(own[new], given[name], atol=1e-6), name
        copy = new.replace("backbone.", "momentum_encoder.", 1)
        assert torch.allclose(own[copy], given[name], atol=1e-6), copy


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, init: Path) -> None:
    config = make(tmp_path, init=init)
    finetune_here(config)
    other = make(tmp_path, f"output={tmp_path / 'resumed'}", "train.checkpoint_every=1", init=init)
    other.train.keep_checkpoints = 9
    finetune_here(other)
    resumed = make(tmp_path, f"output={tmp_path / 'again'}", init=init)
    finetune_here(resumed, checkpoint=Path(other.output) / "checkpoints" / "step_00000002")
    assert different(saved_state(Path(config.output)), saved_state(Path(resumed.output))) == []


def test_a_further_run_takes_the_whole_network(tmp_path: Path, init: Path) -> None:
    first = make(tmp_path, "train.steps=2", "optimizer.lr=1e-2", init=init)
    finetune_here(first)
    second = make(
        tmp_path, f"output={tmp_path / 'second'}", "train.steps=1", "optimizer.lr=1e-30", "optimizer.min_lr=0",
        init=Path(first.output),
    )  # fmt: skip
    finetune_here(second)
    given, own = (dict(load_model(run)[0].named_parameters()) for run in (first.output, second.output))
    for name in given:
        before = given[name]
        if name.startswith("momentum_encoder."):  # it moves before the first step
            before = torch.lerp(before, given[name.replace("momentum_encoder.", "backbone.", 1)], 0.005)
        assert torch.allclose(own[name], before, atol=1e-6), name


def test_figures_are_the_same_on_any_number_of_ranks(tmp_path: Path, init: Path) -> None:
    config = make(tmp_path, "train.steps=1", init=init)
    finetune_here(config)
    found = []
    for count in (1, 2, 3):
        output, predictions = tmp_path / f"{count}.json", tmp_path / f"{count}.predictions.json"
        written = ("--output", str(output), "--predictions", str(predictions))
        options = ("--data", config.data.train, "--batch-size", "5", *written)
        if count == 1:
            assert evaluate.main([config.output, *options]) == 0
        else:
            run_on_ranks(count, ROOT / "train" / "evaluate.py", config.output, *options)
        found.append((json.loads(output.read_text())["vqa"], json.loads(predictions.read_text())))
    assert all(one == found[0] for one in found) and found[0][0]["samples"] == 24


def test_texts_that_leave_no_room_for_answers_are_refused(
    tmp_path: Path, init: Path, capfd: pytest.CaptureFixture
) -> None:
    config = make(tmp_path, init=init)
    config.data.max_length = 11
    words = "expected at most model.text.max_positions less 6 tokens of an answer = 10, got 11"
    with pytest.raises(ConfigError, match=f"data.max_length: {words}"):
        finetune.train_and_validate(config)
    fits = make(tmp_path, f"output={tmp_path / 'fits'}", "train.steps=1", init=init)
    finetune_here(fits)
    assert evaluate.main([fits.output, "--data", fits.data.train, "--text-length", "11"]) == 1
    words = "--text-length: expected 3 to 10 (model.text.max_positions less 6 tokens of an answer), got 11"
    assert words in capfd.readouterr().err
