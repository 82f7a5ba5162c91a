"""The trainer with SyCoCa: it learns, resumes to the bit at every ZeRO stage, and its retrieval is evaluated."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from train_fixtures import different, make_config, run_here, saved_state, write_shard

from softmask.models import SyCoCa, SyCoCaConfig
from softmask.train import evaluate
from softmask.train.checkpoint import config_differences, find_checkpoint, load_model
from softmask.train.config import Config, ConfigError, load_config
from softmask.train.trainer import Trainer

YAML = """
output: {output}
seed: 3
method: sycoca
train: {{steps: 4, batch_size: 8, checkpoint_every: 0, log_every: 1, clip_grad: 1.0}}
optimizer: {{lr: 1e-3, min_lr: 1e-4, warmup_steps: 2}}
model:
  vision: {{name: conv_vit, image_size: 32, conv_vit: {{patch_size: 8, width: 32, depth: 2, heads: 2, stem_width: 8}}}}
  text: {{width: 32, heads: 2, layers: 1, decoder_layers: 1, max_positions: 16}}
  embed_dim: 16
  image_decoder_layers: 1
  image_decoder_heads: 2
data: {{train: {data}, image_size: 32, vocab_size: 64, max_length: 16}}
"""


def make(folder: Path, name: str, *overrides: str) -> Config:
    data = folder / "train.tar"
    if not data.exists():
        write_shard(data)
    path = folder / f"{name}.yaml"
    path.write_text(YAML.format(output=folder / name, data=data), encoding="utf-8")
    return load_config(path, overrides)


@pytest.mark.parametrize(("stage", "queue"), [(0, 0), (2, 0), (3, 0), (0, 32), (3, 32)])
def test_a_stopped_run_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, queue: int) -> None:
    options = (f"deepspeed.zero_optimization.stage={stage}", f"model.queue_size={queue}", "model.momentum=0.9")
    whole = make(tmp_path, "whole", *options)
    run_here(whole)
    halves = make(tmp_path, "halves", *options)
    step = Trainer._step

    def stop_at_two(self: Trainer, batches):
        outputs, stop = step(self, batches)
        return outputs, stop or self.progress.step == 2

    monkeypatch.setattr(Trainer, "_step", stop_at_two)
    assert not run_here(halves).finished
    monkeypatch.setattr(Trainer, "_step", step)
    assert run_here(halves, checkpoint=find_checkpoint(halves.output)).finished
    assert different(saved_state(Path(whole.output)), saved_state(Path(halves.output))) == []
    rows = [json.loads(line) for line in (Path(whole.output) / "log.jsonl").read_text().splitlines()]
    assert {"itc", "caption", "tgmim"} <= rows[0].keys() and "itm" not in rows[0]


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
def test_the_stages_train_alike(tmp_path: Path, options: list[str]) -> None:
    losses = {}
    for stage in (0, 1, 2, 3):
        config = make(tmp_path, f"stage{stage}", f"deepspeed.zero_optimization.stage={stage}", *options)
        run_here(config)
        rows = [json.loads(line) for line in (Path(config.output) / "log.jsonl").read_text().splitlines()]
        losses[stage] = [row["loss"] for row in rows]
    for stage in (1, 2, 3):
        assert losses[stage] == pytest.approx(losses[0], rel=1e-5)


def test_evaluation_ranks_by_itc_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = make(tmp_path, "run", "train.steps=1", "train.activation_checkpointing=true")
    run_here(config)
    model, _, loaded = load_model(config.output)
    assert isinstance(model, SyCoCa) and loaded == dataclasses.replace(config)
    assert evaluate.main([config.output, "--data", config.data.train, "--pairs", "16"]) == 0
    assert "itc" in capsys.readouterr().out
    result = json.loads((Path(config.output) / "metrics.json").read_text())
    assert result["retrieval"]["images"] == 16 and "itm" not in result["retrieval"] and "grounding" not in result


def test_the_method_says_what_the_model_section_is(tmp_path: Path) -> None:
    assert isinstance(make(tmp_path, "a").model, SyCoCaConfig)
    with pytest.raises(ConfigError, match=r"model\.cam_layer: unknown key"):
        make(tmp_path, "b", "model.cam_layer=1")
    (difference,) = config_differences(make(tmp_path, "a"), make_config(tmp_path))
    assert difference == "method (was 'sycoca', now 'softmask_pp')"
    with pytest.raises(ConfigError, match="method: expected softmask_pp or sycoca, got str 'coca'"):
        make(tmp_path, "c", "method=coca")
