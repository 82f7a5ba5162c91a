"""Fine-tuned retrieval and captioning: started from a pre-trained run, with their own terms, validated, evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from softmask.evaluation import evaluate
from softmask.training.checkpoint.store import find_checkpoint, load_model
from softmask.training.config import ConfigError
from tests.support.task_fixtures import finetune_here, pretrained, task_config
from tests.support.train_fixtures import rows

METHODS = ("softmask_pp", "sycoca")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {method: pretrained(tmp_path_factory.mktemp(method), method=method) for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_retrieval_has_the_terms_of_retrieval_alone(method: str, tmp_path: Path, runs: dict[str, Path]) -> None:
    data = runs[method].parent / "train.tar"
    config = task_config(tmp_path, "retrieval", data, f"data.val={data}", "train.validate_every=2", init=runs[method])
    assert config.method == method
    finetune_here(config)
    terms = {"softmask_pp": {"itc", "itm"}, "sycoca": {"itc"}}[method]
    for row in rows(config.output):
        assert row.keys() & {"itc", "itm", "itm_soft", "mlm", "caption", "tgmim"} == terms
    assert len(rows(config.output, "events.jsonl")) == 2
    assert evaluate.main([config.output, "--data", str(data)]) == 0
    found = json.loads((Path(config.output) / "metrics.json").read_text())
    assert ("itm" in found["retrieval"]) == (method == "softmask_pp") and "grounding" not in found


def test_validation_of_retrieval_is_the_mean_of_six_recalls(tmp_path: Path, runs: dict[str, Path]) -> None:
    data = runs["softmask_pp"].parent / "train.tar"
    config = task_config(
        tmp_path, "retrieval", data, f"data.val={data}", "train.steps=1", "head.rerank=3", init=runs["softmask_pp"]
    )
    finetune_here(config)
    assert evaluate.main([config.output, "--data", str(data), "--pairs", "0", "--rerank", "3"]) == 0
    itm = json.loads((Path(config.output) / "metrics.json").read_text())["retrieval"]["itm"]
    mean = sum(share for way in itm.values() for share in way.values()) / 6
    (event,) = rows(config.output, "events.jsonl")
    assert event["score"] == pytest.approx(mean)


def test_captioning_trains_the_caption_loss_alone(tmp_path: Path, runs: dict[str, Path]) -> None:
    data = runs["sycoca"].parent / "train.tar"
    config = task_config(
        tmp_path, "captioning", data, f"data.val={data}", "train.validate_every=3", init=runs["sycoca"]
    )
    finetune_here(config)
    assert all(row["loss"] == pytest.approx(row["caption"]) for row in rows(config.output))
    model, _, _ = load_model(find_checkpoint(config.output))
    assert not [name for name in model.state_dict() if name.startswith(("image_decoder", "contrast"))]
    assert evaluate.main([config.output, "--data", str(data), "--beams", "2"]) == 0
    assert json.loads((Path(config.output) / "metrics.json").read_text())["captioning"]["samples"] == 64


def test_captions_have_a_least_length_and_a_prompt(
    tmp_path: Path, runs: dict[str, Path], capfd: pytest.CaptureFixture
) -> None:
    data = runs["sycoca"].parent / "train.tar"
    head = ("head.min_length=4", "head.prompt=a picture of", f"data.val={data}", "train.steps=1")
    config = task_config(tmp_path, "captioning", data, *head, init=runs["sycoca"])
    finetune_here(config)

    def measured(*options: str) -> dict:
        assert evaluate.main([config.output, "--data", str(data), "--beams", "1", *options]) == 0
        return json.loads((Path(config.output) / "metrics.json").read_text())["captioning"]

    found = measured()
    assert (found["min_length"], found["prompt"]) == (4, "a picture of"), "of the head"
    (event,) = rows(config.output, "events.jsonl")
    assert event["score"] == pytest.approx(found["cider"])
    assert measured("--min-length", "2")["min_length"] == 2
    assert not {"min_length", "prompt"} & measured("--min-length", "0", "--prompt", "").keys()
    for options, words in (
        (["--min-length", "90"], "captions: min_length: expected 0 to "),
        (["--prompt", "a red box " * 9], "captions: prompt: expected fewer than 15 tokens, got "),
    ):
        assert evaluate.main([config.output, "--data", str(data), *options]) == 1
        assert words in capfd.readouterr().err
    assert evaluate.main([str(runs["softmask_pp"]), "--data", str(data), "--prompt", "a", "--pairs", "8"]) == 0
    assert "not used: --prompt: the model generates no captions" in capfd.readouterr().err


def test_a_prompt_that_does_not_fit_is_refused_before_training(tmp_path: Path, runs: dict[str, Path]) -> None:
    data = runs["sycoca"].parent / "train.tar"
    head = (f"head.prompt={'a red box ' * 9}", f"data.val={data}", "train.steps=1")
    config = task_config(tmp_path, "captioning", data, *head, init=runs["sycoca"])
    with pytest.raises(ConfigError, match="captions: prompt: expected fewer than 15 tokens, got "):
        finetune_here(config)
    assert not (Path(config.output) / "log.jsonl").exists()


def test_captioning_is_for_sycoca(tmp_path: Path, runs: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="task: captioning is for sycoca, got softmask_pp"):
        task_config(tmp_path, "captioning", "x.tar", init=runs["softmask_pp"])
