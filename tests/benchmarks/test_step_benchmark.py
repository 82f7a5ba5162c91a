"""benchmarks/step/bench_step.py at a small size: the models' losses and gradients equal the plain recipes'."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from softmask.models import CausalTextConfig, ConvViTConfig, SyCoCaConfig, VisionConfig
from tests.support.train_fixtures import make_config

OVERRIDES = ["model.text.vocab_size=200", "model.text.fusion_layers=3", "model.cam_layer=1", "model.gamma=2"]
METHODS = ["softmask_pp", "sycoca", "open_clip"]


def small_sycoca(style: str = "own") -> SyCoCaConfig:
    """Weights larger than at full size, so that attention is far from uniform."""
    conv_vit = ConvViTConfig(patch_size=8, width=24, depth=2, heads=2, stem_width=4)
    text = CausalTextConfig(
        vocab_size=200, width=32, heads=4, layers=2, decoder_layers=2, max_positions=30, initializer_range=0.1,
        style=style,
    )  # fmt: skip
    return SyCoCaConfig(
        vision=VisionConfig(name="conv_vit", image_size=32, conv_vit=conv_vit),
        text=text,
        embed_dim=16,
        image_decoder_layers=2,
        image_decoder_heads=2,
    )


@pytest.fixture(params=METHODS)
def case(request: pytest.FixtureRequest, tmp_path: Path):
    from benchmarks.step.cases import make_case

    if request.param == "sycoca":
        return make_case(small_sycoca(), 6)
    if request.param == "open_clip":
        return make_case(small_sycoca("open_clip"), 8)
    (tmp_path / "none.tar").touch()
    return make_case(make_config(tmp_path, *OVERRIDES, data=tmp_path / "none.tar").model, 6)


def test_every_loss_and_gradient_equals_the_plain_recipe(case) -> None:
    from benchmarks.step import bench_step

    assert "within the error budget" in bench_step.check_values(case)


@pytest.mark.parametrize("case", ["sycoca"], indirect=True)
def test_every_parameter_of_sycoca_is_compared(case) -> None:
    from benchmarks.step import bench_step

    found = bench_step.values("plain", case)
    layers = {f"gradient {name.rpartition('.')[0] or name}" for name, _ in case.model.named_parameters()}
    assert found.keys() == layers | {"loss total", "loss itc", "loss caption", "loss tgmim"}
    assert all(tensor.norm() > 0 for tensor in found.values())


@pytest.mark.parametrize(
    ("case", "layer"),
    [("softmask_pp", "itm_head"), ("sycoca", "caption_decoder.cross.1.attention.key")],
    indirect=["case"],
)
@pytest.mark.parametrize("factor", [1 + 1e-5, float("nan")])
def test_wrong_gradient_is_detected(case, layer: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.step import bench_step

    values = bench_step.values

    def wrong(name: str, *arguments):
        found = values(name, *arguments)
        if name == "softmask":
            found[f"gradient {layer}"] *= factor
        return found

    monkeypatch.setattr(bench_step, "values", wrong)
    with pytest.raises(AssertionError, match=f"gradient {layer}: error .* of what is allowed"):
        bench_step.check_values(case)


def test_time_memory_and_products_are_reported(case) -> None:
    from benchmarks.step import bench_step

    before = {name: value.clone() for name, value in case.model.named_parameters()}
    steppers = bench_step.make_steppers(case, bf16=False)
    text = "\n".join(bench_step.measure(steppers, turns=1).lines())
    assert "all but the image encoder" in text and "x faster" in text
    assert ("soft masks cost" in text) == ("no masks" in steppers)
    for name, value in case.model.named_parameters():
        assert name.startswith("momentum_encoder.") or torch.equal(value, before[name]), (
            "steps at a learning rate of 0 must not change the weights"
        )
    plain, ours = (bench_step.products(steppers[name].side) for name in ("plain", "softmask"))
    of_vision = [part for part in plain if part.startswith("image encoder")]
    assert len(of_vision) == 2 and all(ours[part] == plain[part] for part in of_vision)
    assert plain["image encoder, backward"] < 2 * plain["image encoder"], (
        "images need no gradient, and other parts are counted apart"
    )
    assert sum(ours.values()) < sum(plain.values())


def test_plain_sycoca_refuses_unpublished_options() -> None:
    from benchmarks.step.cases import make_case
    from benchmarks.step.sides import make_side

    case = make_case(dataclasses.replace(small_sycoca(), masks="random"), 2)
    with pytest.raises(ValueError, match="masks: expected 'attentive', got 'random'"):
        make_side("plain", case)
