"""Learning rates, weight decay, the ramp of soft targets and random state as functions of the step."""

from __future__ import annotations

import pytest
import torch

from softmask.models import SoftMaskPPConfig
from softmask.tasks.softmask_pp import SoftMaskPPTask, alpha_at
from softmask.training.config import ConfigError, OptimizerConfig
from softmask.training.optim import lr_factor, parameter_groups, seed_everything
from tests.support.train_fixtures import (
    make_config,
    make_trainer,
)

ZERO = [0, 1, 2, 3]
pytestmark = pytest.mark.usefixtures("plain_linear")


def test_learning_rate_warms_up_and_follows_a_cosine() -> None:
    config = OptimizerConfig(lr=2.0, min_lr=0.5, warmup_steps=4)
    factors = [lr_factor(step, config, steps=14) for step in range(14)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0 and factors[13] == 0.25 and factors[3:] == sorted(factors[3:], reverse=True)
    cosine = 0.25 + 0.75 * (1 + torch.cos(torch.pi * torch.arange(10).double() / 9)) / 2
    torch.testing.assert_close(torch.tensor(factors[4:], dtype=torch.float64), cosine)


def test_alpha_at_ramps_up_linearly() -> None:
    assert [alpha_at(step, alpha=0.4, warmup_steps=4) for step in (0, 1, 2, 4, 9)] == [0.0, 0.1, 0.2, 0.4, 0.4]
    assert alpha_at(0, alpha=0.4, warmup_steps=0) == 0.4


def test_seed_everything_depends_on_all_its_arguments() -> None:
    def draw(*arguments: int) -> float:
        seed_everything(*arguments)
        return torch.rand(()).item()

    drawn = [draw(0, 0, 0), draw(1, 0, 0), draw(0, 1, 0), draw(0, 0, 1)]
    assert len(set(drawn)) == 4 and draw(0, 0, 0) == drawn[0]


def test_alpha_rises_over_steps_or_epochs() -> None:
    def alpha(step: int, **options) -> float:
        config = SoftMaskPPConfig(alpha=0.4, **options)
        return SoftMaskPPTask().step_options(config, step, steps_per_epoch=10.5)["alpha"]

    assert [alpha(step, alpha_warmup_steps=8) for step in (0, 2, 8, 99)] == pytest.approx([0, 0.1, 0.4, 0.4])
    assert [alpha(step, alpha_warmup_epochs=2) for step in (0, 7, 21, 99)] == pytest.approx([0, 0.4 / 3, 0.4, 0.4])
    assert alpha(0) == 0.4
    with pytest.raises(ValueError, match="alpha_warmup_epochs: expected at least 0, and 0 beside alpha_warmup_steps"):
        SoftMaskPPConfig(alpha_warmup_steps=1, alpha_warmup_epochs=1)


def test_weight_decay_spares_vectors_positions_and_class_tokens(tmp_path) -> None:
    trainer = make_trainer(make_config(tmp_path))
    decayed, plain = parameter_groups(trainer.model, OptimizerConfig(weight_decay=0.3))
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    spared = {
        "backbone.vision.vit.cls_token",
        "backbone.vision.vit.pos_embed",
        "backbone.text.embeddings.position.weight",
    }
    assert all(p.ndim >= 2 and not names[id(p)].endswith("bias") for p in decayed["params"])
    assert {names[id(p)] for p in plain["params"] if p.ndim >= 2 and not names[id(p)].endswith("bias")} == spared
    trained = sum(p.requires_grad for p in trainer.model.parameters())
    assert len(decayed["params"]) + len(plain["params"]) == trained
    assert any(names[id(p)] == "temperature" for p in plain["params"])


def test_lr_scales_apply_to_the_longest_matching_prefix(tmp_path) -> None:
    """Prefixes are of whole parts of a name: "text" is not one of "text_x"."""
    model = make_trainer(make_config(tmp_path)).model
    scales = {"backbone.text": 0.5, "backbone.text.embeddings": 4.0, "itm_head.weight": 2.0}
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1, lr_scales=scales)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in parameter_groups(model, config):
        assert group["lr"] == 1e-2 * group["lr_scale"]
        assert group["weight_decay"] == (0.1 if group["decayed"] else 0.0)
        found |= {names[id(parameter)]: group["lr_scale"] for parameter in group["params"]}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(found) == sorted(trained)
    assert {name for name in found if found[name] == 4.0} == {n for n in trained if ".text.embeddings." in n}
    assert {name for name in found if found[name] == 0.5} == {n for n in trained if ".text.layers." in n}
    assert found["itm_head.weight"] == 2.0 and found["itm_head.bias"] == 1.0
    assert found["backbone.text_projection.weight"] == found["backbone.fusion.layers.0.feed_forward.up.weight"] == 1.0


def test_lr_scale_that_matches_no_parameter_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"optimizer.lr_scales: no trained parameter's .* starts with 'backbone.txt'"):
        make_trainer(make_config(tmp_path, "optimizer.lr_scales={backbone.txt: 2}"))


def test_layers_of_the_image_encoder_learn_the_slower_the_lower_they_are(tmp_path) -> None:
    trainer = make_trainer(make_config(tmp_path))
    options = OptimizerConfig(lr=1.0, min_lr=0.0, vision_layer_decay=0.5, lr_scales={"backbone.vision": 0.1})
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in parameter_groups(trainer.model, options) for p in group["params"]}
    expected = {
        "backbone.vision.vit.norm.weight": 0.1,
        "backbone.vision.vit.blocks.1.mlp.fc1.weight": 0.05,
        "backbone.vision.vit.blocks.0.norm1.bias": 0.025,
        "backbone.vision.vit.pos_embed": 0.0125,
        "backbone.vision.vit.patch_embed.layers.0.0.weight": 0.0125,
        "backbone.text.embeddings.word.weight": 1.0,
    }
    assert {name: rates[name] for name in expected} == pytest.approx(expected)
