"""The trainer with SyCoCa: it resumes bit for bit at every ZeRO stage, and the run is evaluated and reported."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from softmask import reference
from softmask.data import open_source
from softmask.evaluation import captioning, command, evaluate, readers, reconstruction
from softmask.evaluation.one_pass import encode, measure_one
from softmask.models import SyCoCa, SyCoCaConfig
from softmask.models.sycoca import caption_head
from softmask.report import build as report
from softmask.report import generated as report_generation
from softmask.training.checkpoint.store import config_differences, find_checkpoint, load_model
from softmask.training.config import Config, ConfigError
from softmask.training.trainer import Trainer
from tests.support.train_fixtures import (
    ROOT,
    different,
    make_config,
    make_sycoca_config,
    rows,
    run_here,
    run_on_ranks,
    saved_state,
)

SECTIONS = ("retrieval", "captioning", "reconstruction")


@pytest.mark.parametrize(
    ("stage", "queue"), [(0, 0), (2, 0), (3, 0), (0, 32), pytest.param(3, 32, marks=pytest.mark.slow)]
)
def test_stopped_run_resumes_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, stage: int, queue: int
) -> None:
    options = (f"deepspeed.zero_optimization.stage={stage}", f"model.queue_size={queue}", "model.momentum=0.9")
    whole = make_sycoca_config(tmp_path, "whole", *options)
    run_here(whole)
    (last,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("step 4/4")]
    assert all(f"  {term} " in last for term in ("loss", "itc", "caption", "tgmim"))
    halves = make_sycoca_config(tmp_path, "halves", *options)
    step = Trainer._step

    def stop_at_two(self: Trainer, batches):
        outputs, stop = step(self, batches)
        return outputs, stop or self.progress.step == 2

    monkeypatch.setattr(Trainer, "_step", stop_at_two)
    assert not run_here(halves).finished
    monkeypatch.setattr(Trainer, "_step", step)
    assert run_here(halves, checkpoint=find_checkpoint(halves.output)).finished
    assert different(saved_state(Path(whole.output)), saved_state(Path(halves.output))) == []
    first = rows(whole.output)[0]
    assert {"itc", "caption", "tgmim"} <= first.keys() and "itm" not in first


OPTIONS = {
    "defaults": [],
    "queue and pooler": [
        "model.queue_size=32",
        "model.momentum=0.9",
        "model.pooler_queries=4",
        "model.caption_masking=pixels",
        "model.reconstruct_masking=tokens",
    ],
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_zero_stages_train_alike(tmp_path: Path, options: list[str]) -> None:
    losses = {stage: losses_at_stage(tmp_path, f"stage{stage}", stage, options) for stage in (0, 1, 2, 3)}
    for stage in (1, 2, 3):
        assert losses[stage] == pytest.approx(losses[0], rel=1e-5)


def losses_at_stage(folder: Path, name: str, stage: int, options: Sequence[str] = ()) -> list[float]:
    config = make_sycoca_config(folder, name, f"deepspeed.zero_optimization.stage={stage}", *options)
    run_here(config)
    return [row["loss"] for row in rows(config.output)]


def test_zero_stages_train_alike_with_the_caption_loss_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At stage 3, the head's weight must be gathered again to recompute the logits."""
    common = ["optimizer.eps=1e-5"]  # well above rounding
    whole = losses_at_stage(tmp_path, "whole", 0, common)
    monkeypatch.setattr(caption_head, "MOST_LOGITS", 8 * 64)  # eight tokens
    kept = "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
    for stage, options in ((0, common), (3, [*common, kept])):
        assert losses_at_stage(tmp_path, f"parts{stage}", stage, options) == pytest.approx(whole, rel=1e-5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A trained run, evaluated beside training captions and a list of classes."""
    folder = tmp_path_factory.mktemp("sycoca")
    config = make_sycoca_config(folder, "run", "train.steps=1", "train.activation_checkpointing=true")
    run_here(config)
    data = config.data.train
    classes = Path(data).parent / "concepts.json"
    classes.write_text(json.dumps([{"name": "paper", "phrase": "a paper"}]), encoding="utf-8")
    assert evaluate.main([config.output, "--data", data, "--training", data, "--pairs", "16", "--beams", "2"]) == 0
    return config


def test_evaluation_ranks_by_itc_alone(run: Config) -> None:
    model, _, loaded = load_model(run.output)
    assert isinstance(model, SyCoCa) and loaded == dataclasses.replace(run)
    result = json.loads((Path(run.output) / "metrics.json").read_text())
    assert result["retrieval"]["images"] == 16 and "itm" not in result["retrieval"] and "grounding" not in result


def test_any_number_of_ranks_finds_the_same(run: Config, tmp_path: Path) -> None:
    """To the last digit, in pieces of five pictures."""
    found = []
    for count in (1, 2, 3):
        output = tmp_path / f"{count}.json"
        data = ["--data", run.data.train, "--training", run.data.train, "--pairs", "16", "--batch-size", "5"]
        options = [*data, "--beams", "2", "--output", str(output)]
        run_on_ranks(count, ROOT / "train" / "evaluate.py", run.output, *options)
        found.append({name: json.loads(output.read_text())[name] for name in SECTIONS})
    assert found[0] == found[1] == found[2] and found[0]["captioning"]["neighbours"] == 64


def test_evaluation_uses_torch_attention(run: Config, tmp_path: Path) -> None:
    """Weights are fp32 in evaluation, which flash-attn does not take, and the package may not be installed."""
    checkpoint = shutil.copytree(find_checkpoint(run.output), tmp_path / "step_00000001")
    path = checkpoint / "config.yaml"
    text = path.read_text(encoding="utf-8")
    assert text.count("attention: sdpa") == 1
    path.write_text(text.replace("attention: sdpa", "attention: flash_attn"), encoding="utf-8")
    model, _, loaded = load_model(checkpoint)
    assert loaded.model.text.attention == model.backbone.text.blocks[0].attention.library == "sdpa"


def test_evaluation_scores_captions_and_reconstructions(run: Config) -> None:
    result = json.loads((Path(run.output) / "metrics.json").read_text())
    section = result["captioning"]
    assert (section["samples"], section["beams"]) == (16, 2)
    names = ["cider", "bleu4", "rouge_l"] + ["meteor"] * captioning.has_java()
    for scores in (section, section["beams_alone"], section["nearest"], section["random"]):
        assert all(scores[name] >= 0 for name in names)
    assert section["nearest"]["bleu4"] == pytest.approx(1.0)  # these images are of the training set
    gap = result["reconstruction"]
    assert gap["low"] < gap["gap"] < gap["high"] and gap["right"] > 0
    assert "zero_shot" not in result  # no image has objects


def test_reconstruction_gap_equals_that_of_the_model_loss(run: Config) -> None:
    """All images in one batch, by the model's own calls: the same patches reconstructed by either caption."""
    scorer = command.load_scorer(find_checkpoint(run.output), batch_size=5)
    model = scorer.model
    with torch.no_grad():
        for weight in model.image_decoder.parameters():  # so large that captions make a difference
            weight.mul_(10.0)
    reader = readers.Reader(open_source(run.data.train))
    section = measure_one(scorer, reader, reconstruction.Reconstruction(scorer, reader), pairs=16)
    pairs = [pair for pair in reconstruction.with_another(reader.read(range(17))) if pair[0].index < 16]
    images = readers.pixels(scorer, [sample for sample, _ in pairs])
    tokens = [scorer.tokens(texts) for texts in zip(*((sample.caption, other) for sample, other in pairs), strict=True)]
    right, wrong = ((one.input_ids, one.attention_mask) for one in tokens)
    with torch.no_grad():
        hidden = model.hidden_patches(images, *right)
        reconstructed = [model.reconstruct(images, hidden, *one) for one in (right, wrong)]
    losses = [reference.masked_patch_loss(x, images, hidden, patch_size=model.patch_size).item() for x in reconstructed]
    assert section["samples"] == len(pairs) and abs(losses[1] - losses[0]) > 1e-3 * losses[0]
    assert [section["right"], section["wrong"]] == pytest.approx(losses, rel=1e-5)


def test_report_shows_captions_and_reconstructions(run: Config) -> None:
    data = run.data.train
    assert report.main([run.output, "--data", data, "--scenes", "3"]) == 0
    page = (Path(run.output) / "report.html").read_text(encoding="utf-8")
    assert "<h1>SyCoCa <span>run</span></h1>" in page and "CIDEr" in page
    assert page.count('<div class="reconstruction">') == 3 and page.count("true caption: a ") == 3
    assert "ITM" not in page and "Grad-CAM" not in page


def test_captions_do_not_depend_on_the_batch_size(run: Config) -> None:
    scorer = command.load_scorer(find_checkpoint(run.output), batch_size=5)
    samples = list(readers.Reader(open_source(run.data.train)).read(range(12)))
    seen = encode(scorer, samples)
    written = captioning.write_captions(scorer, seen, captioning.CaptionOptions(beams=2))
    scorer.batch_size = 12
    again = captioning.write_captions(scorer, seen, captioning.CaptionOptions(beams=2))
    assert written == again and len(written.chosen) == len(written.beams_alone) == len(seen.tokens)
    greedy = captioning.write_captions(scorer, seen, captioning.CaptionOptions(beams=1))
    assert len(greedy.chosen) == len(seen.tokens) and greedy.beams_alone == []
    shown = reconstruction.reconstruct(scorer, encode(scorer, samples[:3]), [sample.caption for sample in samples[1:4]])
    whole = report_generation.to_patches(shown.images, scorer.model.patch_size)
    back = report_generation.from_patches(whole, scorer.model.patch_size, scorer.model.patch_grid)
    assert torch.equal(back, shown.images)
    true = (whole - whole.mean(-1, keepdim=True)) / (whole.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(report_generation.restored(true, whole, normalized=True), whole)
    error = reconstruction.error_by_image(scorer, true, shown.images, shown.hidden)
    assert error.max() < 1e-10


def test_method_determines_the_model_section(tmp_path: Path) -> None:
    assert isinstance(make_sycoca_config(tmp_path, "a").model, SyCoCaConfig)
    with pytest.raises(ConfigError, match=r"model\.cam_layer: unknown key"):
        make_sycoca_config(tmp_path, "b", "model.cam_layer=1")
    (difference,) = config_differences(make_sycoca_config(tmp_path, "a"), make_config(tmp_path))
    assert difference == "method (was 'sycoca', now 'softmask_pp')"
    with pytest.raises(ConfigError, match="method: expected softmask_pp, sycoca or module:Class .* got 'coca'"):
        make_sycoca_config(tmp_path, "c", "method=coca")
