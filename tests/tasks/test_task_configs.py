"""The full-size configurations of tasks after pre-training: they take the model of a full-size run and can be built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from softmask.models import SpecialIds
from softmask.tasks.downstream import DownstreamTask
from softmask.tasks.registry import find_downstream, known
from softmask.training.checkpoint.store import longest_text
from softmask.training.config import ConfigError, load_config, save_config
from tests.support.train_fixtures import ROOT

CONFIGS = ROOT / "train" / "configs"
BERT = SpecialIds(pad=0, cls=101, sep=102, mask=103)
# Millions of trained weights: ViT-B/16 at 384 px 86.1, BERT's text layers 66.4, the fusion layers 56.7 ...
SIZES = {
    "snli_ve": 209.8, "nlvr2": 259.3, "vqa": 290.3, "retrieval": 210.2, "captioning": 389.3, "classification": 86.1,
    "text_assignment": 258.5,
    "vqa_sycoca": 388.6,
}  # fmt: skip


def trains(task: str) -> bool:
    return bool(find_downstream(task).section)


def full_size_run(folder: Path, name: str) -> Path:
    """The folder of a run, as far as a configuration reads it."""
    base = load_config(CONFIGS / f"{name}.yaml", ["model.text.vocab_size=30522"])
    folder.mkdir()
    save_config(base, folder / "config.yaml")
    return folder


@pytest.mark.parametrize("name", [*filter(trains, known(DownstreamTask)), "vqa_sycoca"])
def test_configuration_takes_the_model_of_a_full_size_run(name: str, tmp_path: Path) -> None:
    method = "sycoca" if name in ("captioning", "vqa_sycoca") else "softmask_pp"
    base = "sycoca_base" if method == "sycoca" else "softmask_base"
    names = ["head.names=[cat, dog]"] if name == "classification" else []
    config = load_config(CONFIGS / f"{name}.yaml", [f"init={full_size_run(tmp_path / 'run', base)}", *names])
    assert (config.method, config.task) == (method, name.removesuffix("_sycoca"))
    longest, _ = longest_text(config)
    assert config.data.max_length <= longest
    assert config.data.image_size == config.model.vision.image_size
    assert config.data.mean == load_config(tmp_path / "run" / "config.yaml").data.mean
    with torch.device("meta"):
        model = config.find_task().build(config.model, BERT)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained / 1e6 == pytest.approx(SIZES[name], rel=5e-3)


def test_own_keys_count_more_than_those_of_the_pretrained_run(tmp_path: Path) -> None:
    run = full_size_run(tmp_path / "run", "softmask_base")
    overrides = [f"init={run}", "data.max_length=12", "model.text.dropout=0.3", "model.vision.drop_path=0.1"]
    config = load_config(CONFIGS / "snli_ve.yaml", overrides)
    assert (config.data.max_length, config.model.text.dropout, config.model.vision.drop_path) == (12, 0.3, 0.1)
    assert config.model.text.width == 768 and config.model.vision.name == "vit_base_patch16_224"


@pytest.mark.parametrize("override, words", [
    ("init=nowhere", "init: expected the folder of a run or checkpoint, with its config.yaml, got 'nowhere'"),
    ("task=knitting", "task: expected captioning, classification, grounding, nlvr2, retrieval, snli_ve, text_assign"),
    ("head.gamma=1", "head.gamma: unknown key; known: alpha, alpha_warmup_epochs, momentum"),
    ("method=sycoca", "task: snli_ve is for softmask_pp, got sycoca"),
    ("head.alpha=2", "head.alpha: expected a number in [0, 1], got 2"),
])  # fmt: skip
def test_what_cannot_be_is_refused(override: str, words: str, tmp_path: Path) -> None:
    init = [] if override.startswith("init") else [f"init={full_size_run(tmp_path / 'run', 'softmask_base')}"]
    with pytest.raises(ConfigError) as refused:
        load_config(CONFIGS / "snli_ve.yaml", [*init, override])
    assert words in str(refused.value)
