"""Fine-tuned classification of both methods: names from the data, weights from the run, mixed images, other data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from softmask.batch import LabeledBatch
from softmask.evaluation import evaluate
from softmask.evaluation.tasks.linear_probe import DECAYS, Labeled, fit
from softmask.models.classification import ImageClassifier
from softmask.models.config import ClassificationHead
from softmask.training.checkpoint.store import load_model
from softmask.training.config import load_config
from tests.support.model_fixtures import SPECIAL, small_batch, small_config
from tests.support.task_fixtures import finetune_here, pretrained, task_config, write_classification
from tests.support.train_fixtures import COLOURS, different, rows, saved_state

METHODS = ("softmask_pp", "sycoca")


@pytest.fixture(scope="module", params=METHODS)
def init(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained(tmp_path_factory.mktemp(request.param), method=request.param)


def test_classes_are_those_of_the_data_and_other_data_are_matched_by_name(tmp_path: Path, init: Path) -> None:
    data = write_classification(tmp_path)
    config = task_config(tmp_path, "classification", data, f"data.val={data}", "train.validate_every=2", init=init)
    finetune_here(config)
    assert load_config(Path(config.output) / "config.yaml").head.names == sorted(COLOURS)
    assert evaluate.main([config.output, "--data", str(data)]) == 0
    found = json.loads((Path(config.output) / "metrics.json").read_text())["classification"]
    assert found["samples"] == 24 and found["classes"] == 4 and found["chance"] == 0.25

    shutil.rmtree(data / "blue")
    (data / "white").rename(data / "mauve")
    left = sum(len(list((data / name).iterdir())) for name in ("green", "red"))
    assert evaluate.main([config.output, "--data", str(data)]) == 0
    again = json.loads((Path(config.output) / "metrics.json").read_text())["classification"]
    assert again["samples"] == left and again["classes"] == 4


def test_validation_numbers_classes_as_training_does(tmp_path: Path, init: Path) -> None:
    data, val = write_classification(tmp_path / "train"), write_classification(tmp_path / "val")
    shutil.rmtree(val / "blue")  # the first class
    (val / "mauve").mkdir()
    config = task_config(tmp_path, "classification", data, f"data.val={val}", "train.steps=2", init=init)
    finetune_here(config)
    assert evaluate.main([config.output, "--data", str(val)]) == 0
    found = json.loads((Path(config.output) / "metrics.json").read_text())["classification"]
    (event,) = rows(config.output, "events.jsonl")
    assert event["score"] == pytest.approx(found["top1"]) and found["samples"] < 24


def test_network_is_the_pretrained_image_encoder(tmp_path: Path, init: Path) -> None:
    data = write_classification(tmp_path)
    still = ("train.steps=1", "optimizer.lr=1e-30", "optimizer.min_lr=0")
    config = task_config(tmp_path, "classification", data, *still, init=init)
    finetune_here(config)
    given, own = (dict(load_model(run)[0].named_parameters()) for run in (init, config.output))
    vision = [name for name in given if name.startswith("backbone.vision.")]
    assert all(torch.allclose(own[name], given[name], atol=1e-6) for name in vision)
    assert own.keys() - given.keys() == {"backbone.head.weight", "backbone.head.bias"}


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, init: Path) -> None:
    """Mixed images are drawn again as they were."""
    data = write_classification(tmp_path)
    config = task_config(tmp_path, "classification", data, init=init)
    finetune_here(config)
    first = task_config(
        tmp_path, "classification", data, f"output={tmp_path / 'first'}", "train.checkpoint_every=2", init=init
    )
    finetune_here(first)
    resumed = task_config(tmp_path, "classification", data, f"output={tmp_path / 'second'}", init=init)
    finetune_here(resumed, checkpoint=Path(first.output) / "checkpoints" / "step_00000002")
    assert different(saved_state(Path(config.output)), saved_state(Path(resumed.output))) == []


def test_loss_is_of_smoothed_labels_and_of_mixed_images() -> None:
    torch.manual_seed(0)
    names = ["one", "two", "three"]
    batch = LabeledBatch(**vars(small_batch(6)), labels=torch.arange(6) % 3)
    plain = ImageClassifier(small_config(), ClassificationHead(names, 0.1, 0.0, 0.0), special_ids=SPECIAL)
    torch.nn.init.normal_(plain.backbone.head.weight)
    log_p = plain.backbone(batch.images).log_softmax(1)
    expected = -(0.9 * log_p[torch.arange(6), batch.labels] + 0.1 * log_p.mean(1)).mean()
    torch.testing.assert_close(plain(batch).loss, expected)
    mixing = ImageClassifier(small_config(), ClassificationHead(names, 0.1, 0.8, 1.0), special_ids=SPECIAL)
    mixing.load_state_dict(plain.state_dict())
    images = batch.images.clone()
    odd = LabeledBatch(**vars(small_batch(5)), labels=torch.arange(5) % 3)
    assert mixing(odd).loss.isfinite()
    mixing.load_state_dict(plain.state_dict())
    assert (mixing(batch).loss - plain(batch).loss).abs() > 1e-4 and torch.equal(batch.images, images)
    mixing.load_state_dict(plain.state_dict())  # BatchNorm's statistics of unmixed images
    torch.testing.assert_close(mixing.eval()(batch).loss, plain.eval()(batch).loss)


def test_pretrained_model_classifies_by_names_and_by_a_probe(tmp_path: Path, init: Path) -> None:
    data, output = write_classification(tmp_path), tmp_path / "found.json"
    (data.parent / "zeroshot_classification_templates.txt").write_text("a {c} box\na {c} box on white paper\n")
    options = ["--data", str(data), "--task", "classification", "--training", str(data), "--output", str(output)]
    assert evaluate.main([str(init), *options]) == 0
    found = json.loads(output.read_text())["classification"]
    assert (found["samples"], found["classes"], found["zero_shot"]["templates"]) == (24, 4, 2)
    assert found["linear_probe"]["top1"] > 0.3 and found["linear_probe"]["top5"] == 1.0  # seen in its training
    assert 0 <= found["zero_shot"]["top1"] <= found["zero_shot"]["top5"] == 1.0


def test_task_that_needs_training_is_refused(init: Path, capfd: pytest.CaptureFixture) -> None:
    assert evaluate.main([str(init), "--data", "x.json", "--task", "snli_ve"]) == 1
    assert "evaluate: --task: snli_ve " in capfd.readouterr().err


def test_probe_separates_what_is_separable_and_chooses_its_decay() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(5, 16, generator=generator), dim=1)
    labels = torch.arange(500) % 5
    noisy = torch.nn.functional.normalize(centres[labels] + 0.1 * torch.randn(500, 16, generator=generator), dim=1)
    train, val = Labeled(noisy, labels).split(0.2, seed=1)
    assert len(train.labels) == 400 and len(val.labels) == 100
    probe = fit(train, val, classes=5)
    assert probe.accuracy > 0.97 and probe.decay in DECAYS
    again = fit(train, val, classes=5)
    assert torch.equal(probe.weight, again.weight) and probe.decay == again.decay
    shuffled = Labeled(noisy, labels[torch.randperm(500, generator=generator)])
    assert fit(*shuffled.split(0.2, seed=1), classes=5).accuracy < 0.4
