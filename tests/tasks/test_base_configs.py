"""The full-size configurations load and build models of the published size; a run starts from another's weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from softmask.models import SoftMaskPP, SpecialIds, SyCoCa
from softmask.training.checkpoint.initial import start_from
from softmask.training.checkpoint.state import CheckpointError
from softmask.training.checkpoint.store import find_checkpoint
from softmask.training.config import Config, load_config
from softmask.training.optim import parameter_groups
from tests.support.train_fixtures import ROOT, make_config, make_trainer, run_here, write_shard

BERT = SpecialIds(pad=0, cls=101, sep=102, mask=103)
CONFIGS = ROOT / "train" / "configs"
BASE = ["albef_base.yaml", "softmask_base.yaml", "softmask_retrieval_384.yaml"]


def load(name: str) -> Config:
    return load_config(CONFIGS / name, ["model.text.vocab_size=30522"])


@pytest.mark.parametrize("name", BASE)
def test_softmask_models_have_the_published_size(name: str) -> None:
    """ViT-B/16 (86 million weights) and BERT-base (109.5) with six cross-attentions (14.2), projections and heads."""
    config = load(name)
    with torch.device("meta"):
        model = SoftMaskPP(config.model, special_ids=BERT)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == pytest.approx(209.9e6, rel=2e-3)
    assert model.num_prefix_tokens == 1 and model.patch_grid == (config.data.image_size // 16,) * 2
    assert model.contrast.image_queue.shape == (65536, 256)
    assert (config.train.precision, config.model.momentum, config.model.alpha) == ("bf16", 0.995, 0.4)


def test_sycoca_has_the_published_size() -> None:
    """ViT-B/18 (86 million weights), a text encoder (109), a decoder (170) and its head (23), an image decoder (57)."""
    config = load("sycoca_base.yaml")
    with torch.device("meta"):
        model = SyCoCa(config.model, special_ids=BERT)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(446.4e6, rel=2e-3)
    assert (model.num_prefix_tokens, model.patch_grid, model.backbone.vision.patch_size) == (1, (16, 16), 18)
    assert (config.data.max_length, model.backbone.text.position.num_embeddings) == (76, 77)
    assert vars(config.model.weights) == {"itc": 1.0, "caption": 2.0, "tgmim": 1.0}
    assert isinstance(model.backbone.vision.vit.norm_pre, torch.nn.LayerNorm) and model.backbone.text.open_clip
    assert config.data.eval_resize == "crop"
    assert (8 * config.train.batch_size, config.train.epochs, config.train.precision) == (2048, 20, "bf16")


def test_coca_has_the_published_size() -> None:
    """SyCoCa without the image decoder, with a pooler (2.6 million weights) of 256 + 1 queries."""
    config, sycoca = load("coca_base.yaml"), load("sycoca_base.yaml")
    with torch.device("meta"):
        model = SyCoCa(config.model, special_ids=BERT)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(391.5e6, rel=2e-3)
    assert model.backbone.pooler.queries.shape == (257, 768) and (
        config.model.weights.itc,
        config.model.weights.caption,
    ) == (
        1,
        2,
    )
    assert (config.model.reconstruct, config.model.caption_masking) == (False, "none")
    assert (config.data, config.optimizer, config.train) == (sycoca.data, sycoca.optimizer, sycoca.train)


SPARED = {"albef_base.yaml": {"embeddings.position.weight"}, "sycoca_base.yaml": {"text.position.weight"}}


@pytest.mark.parametrize("name", SPARED)
def test_positions_and_class_tokens_do_not_decay(name: str) -> None:
    config = load(name)
    with torch.device("meta"):
        model = (SyCoCa if config.method == "sycoca" else SoftMaskPP)(config.model, special_ids=BERT)
    names = {id(parameter): parameter_name for parameter_name, parameter in model.named_parameters()}
    decayed, spared = parameter_groups(model, config.optimizer)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (config.optimizer.weight_decay, 0.0)
    assert all(names[id(p)].endswith((".weight", "pooler.queries")) for p in decayed["params"])
    wide = {names[id(p)] for p in spared["params"] if p.ndim > 1}
    expected = {"vit.pos_embed", "vit.cls_token", *SPARED[name]}
    assert len(wide) == len(expected) and all(any(one.endswith(end) for one in wide) for end in expected)


def test_configurations_hold_the_published_settings() -> None:
    albef, softmask, retrieval = (load(name) for name in BASE)
    assert (albef.model.soft_mask, albef.model.gamma, albef.model.mask_text) == (False, 0.0, "mlm")
    assert (softmask.model.soft_mask, softmask.model.gamma, softmask.data.distort) == (True, 2.0, True)
    for config in (albef, softmask):
        optimizer = config.optimizer
        assert (optimizer.lr, optimizer.min_lr, optimizer.warmup_steps) == (1e-4, 1e-5, 2000)
        assert (config.model.alpha, config.model.alpha_warmup_epochs) == (0.4, 1.0)
        assert (optimizer.weight_decay, config.train.batch_size, config.train.epochs) == (0.02, 64, 30)
    for config in (albef, softmask, retrieval):
        assert (config.data.clean_captions, config.data.append_sep) == (True, False)
        assert (config.data.captions, config.data.eval_resize) == ("all" if config is retrieval else "random", "squash")
    assert retrieval.model.alpha_warmup_epochs == 1.0
    assert retrieval.init == softmask.output and retrieval.model.share_positives
    assert retrieval.model.weights.mlm == 0.0 and retrieval.optimizer.lr == 1e-5


VIT = ["model.vision.name=vit_tiny_patch16_224", "train.steps=1", "train.batch_size=4"]


def test_run_starts_from_the_weights_of_another(tmp_path: Path) -> None:
    """Weights, momentum encoder, queue and tokenizer, and position embeddings for larger images."""
    write_shard(tmp_path / "train.tar")
    first = run_here(make_config(tmp_path, *VIT, f"output={tmp_path / 'first'}"))
    larger = ["model.vision.image_size=64", "data.image_size=64", "model.weights.mlm=0", "model.mask_text=mlm"]
    config = make_config(tmp_path, *VIT, *larger, f"output={tmp_path / 'second'}", f"init={tmp_path / 'first'}")
    second = make_trainer(config)
    before, after = (trainer.model.state_dict() for trainer in (first, second))
    for name, tensor in before.items():
        if name.endswith("pos_embed"):
            assert after[name].shape == (1, 17, 192) and torch.equal(after[name][:, :1], tensor[:, :1])
        elif name == "contrast.queue_ids":  # numbers of other images
            assert (tensor >= 0).any() and (after[name] == -1).all()
        else:
            assert torch.equal(after[name], tensor), name
    assert (tmp_path / "second" / "tokenizer" / "tokenizer.json").read_bytes() == (
        tmp_path / "first" / "tokenizer" / "tokenizer.json"
    ).read_bytes()
    second.run()
    head = {name for name in after if name.startswith("backbone.mlm_head.")}
    trained = second.model.state_dict()
    assert all(torch.equal(trained[name], before[name]) for name in head if not name.endswith("dense.weight"))
    assert not torch.equal(trained["itm_head.weight"], before["itm_head.weight"])

    other = make_trainer(make_config(tmp_path, *VIT, "model.text.width=64", f"output={tmp_path / 'third'}"))
    with pytest.raises(
        CheckpointError, match=r"not the model of this configuration, \d+ differ: .* has shape .* expected"
    ):
        start_from(other.model, tmp_path / "first")
    with pytest.raises(CheckpointError, match="no such folder"):
        start_from(other.model, tmp_path / "nowhere")
    for damaged in (b"version https://git-lfs.github.com/spec/v1\n", b"nonsense" * 99, b""):
        (find_checkpoint(tmp_path / "first") / "mp_rank_00_model_states.pt").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"^init: .*step_00000001 cannot be read: .+"):
            start_from(other.model, tmp_path / "first")
