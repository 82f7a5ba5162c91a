"""SoftMask++ against a plain ALBEF, a materialized Grad-CAM and explicitly masked image tokens."""

from __future__ import annotations

import copy

import pytest
import torch

import softmask
from benchmarks.step.plain_softmask_pp import AttentionMap, PlainSoftMaskPP
from softmask import ops
from softmask.models import SoftMaskPP
from softmask.models.softmask_pp.masking import Draws
from tests.support.kernel_cases import needs_cpp
from tests.support.model_fixtures import SPECIAL, small_batch, small_config, small_draws, small_model
from tests.support.two_ranks import own_rows, run_on_two_ranks

ALBEF = {"soft_mask": False, "gamma": 0.0, "mask_text": "mlm"}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def worst_error(actual: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Largest error of any tensor, relative to its largest entry; at least 1e-6, for gradients that are only rounding:
    a key's bias cancels in the softmax."""
    assert actual.keys() == truth.keys()
    return max(
        ((actual[name].double() - value.double()).abs().max() / value.abs().max().clamp_min(1e-6)).item()
        for name, value in truth.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_additions_every_term_and_gradient_equals_albef(dtype):
    model, batch = small_model(**ALBEF).to(dtype), small_batch(dtype=dtype)
    draws = small_draws(batch)
    output = model(batch, alpha=0.4, draws=draws)
    output.loss.backward()
    ours = gradients(model)

    plain_model = copy.deepcopy(model)
    plain_model.zero_grad()
    plain = PlainSoftMaskPP(plain_model).losses(batch, draws, alpha=0.4)
    sum(plain.values()).backward()
    assert plain.keys() == {"itc", "itm", "mlm"}
    rounding = 1e-5 if dtype == torch.float32 else 1e-11
    for name, value in plain.items():
        assert output.terms[name].item() == pytest.approx(value.item(), rel=rounding), name
    if dtype == torch.float64:
        assert worst_error(ours, gradients(plain_model)) < 1e-9


def test_soft_mask_equals_the_materialized_gradcam_of_the_word():
    """dS/dA through a materialized attention, mean over heads of A * relu(dS/dA) at the word's tokens, min-max."""
    model, batch = small_model().double(), small_batch(dtype=torch.float64)
    draws = small_draws(batch)
    weight = model(batch, draws=draws).image_weight

    plain, attention = PlainSoftMaskPP(model), AttentionMap()
    text = plain.text(model.backbone, draws.masked.input_ids, batch.attention_mask)
    match = plain.match(text, batch.attention_mask, model.backbone.vision(batch.images), attention)
    match[:, 1].sum().backward()
    cam = (attention.values * attention.gradient.clamp_min(0)).mean(1)[:, :, model.num_prefix_tokens :]
    assert (cam > 0).any()
    for row, positions in enumerate(draws.word_index):
        positions = positions[positions >= 0]
        word = cam[row, positions].mean(0) if len(positions) else torch.zeros_like(cam[row, 0])
        expected = 1 - (word - word.min()) / (word.max() - word.min() + 1e-7)
        torch.testing.assert_close(weight[row, model.num_prefix_tokens :], expected.detach())
    assert (weight[:, : model.num_prefix_tokens] == 1).all()


def test_soft_masked_pass_equals_a_pass_over_masked_image_tokens():
    model, batch = small_model().double(), small_batch(dtype=torch.float64)
    draws = small_draws(batch)
    output = model(batch, draws=draws)

    plain = PlainSoftMaskPP(model)
    image = model.backbone.vision(batch.images)
    maps = 1 - output.image_weight[:, model.num_prefix_tokens :]
    soft = ops.soft_mask(image, maps, normalize=None, num_prefix_tokens=model.num_prefix_tokens)
    text, mask = plain.text(model.backbone, draws.masked.input_ids, batch.attention_mask), batch.attention_mask
    logits = [
        plain.match(text, mask, soft),
        plain.match(text, mask, image[draws.hard_image]),
        plain.match(text[draws.hard_text], mask[draws.hard_text], soft),
    ]
    target = torch.tensor([1] * len(image) + [0] * 2 * len(image))
    expected = torch.nn.functional.cross_entropy(torch.cat(logits), target)
    assert output.terms["itm_soft"].item() == pytest.approx(expected.item(), rel=1e-11)


@pytest.mark.parametrize("given", ["masked", "hard_text", "hard_image", "word_index"])
def test_every_draw_can_be_given(given):
    """Giving one draw alone changes the loss."""
    model, batch = small_model(mask_probability=0.3).double(), small_batch(dtype=torch.float64)
    losses = []
    for seed in (2, 3):
        draws = Draws(**{given: getattr(small_draws(batch, seed=seed), given)})
        torch.manual_seed(7)
        losses.append(model(batch, draws=draws).loss.item())
    torch.manual_seed(7)
    assert losses[0] != losses[1] and model(batch).loss.item() not in losses


def test_each_addition_can_be_switched_off():
    for options in ({"soft_mask": False}, {"gamma": 0.0}, {"mask_text": "mlm"}, {"soft_negatives": False}):
        output = small_model(**options)(small_batch())
        assert ("itm_soft" in output.terms) == options.get("soft_mask", True)
        output.loss.backward()
        assert torch.isfinite(output.loss)


def test_word_maps_work_without_grad_mode_and_leave_grad_unset():
    model, batch = small_model(), small_batch()
    word_index = torch.tensor([[[1, 2], [3, -1], [-1, -1]]]).expand(len(batch.images), -1, -1)
    with torch.no_grad():
        maps = model.word_maps(batch.images, batch.input_ids, batch.attention_mask, word_index)
    assert maps.shape == (6, 3, 16) and not maps.requires_grad
    assert (maps[:, :2] > 0).any() and (maps[:, 2] == 0).all()
    assert all(p.grad is None for p in model.parameters())
    frozen = copy.deepcopy(model).requires_grad_(False)
    again = frozen.word_maps(batch.images, batch.input_ids, batch.attention_mask, word_index)
    assert torch.equal(maps, again)
    attention = model.word_maps(batch.images, batch.input_ids, batch.attention_mask, word_index, kind="attention")
    assert (attention[:, :2].sum(-1) < 1).all() and (attention[:, :2] > 0).all()
    with pytest.raises(ValueError, match="kind"):
        model.word_maps(batch.images, batch.input_ids, batch.attention_mask, word_index, kind="saliency")


@pytest.mark.parametrize("kind", ["gradcam", "attention"])
def test_word_maps_of_captions_that_share_an_image_equal_those_of_repeated_images(kind):
    model, batch = small_model().double().eval(), small_batch(dtype=torch.float64)
    index = torch.tensor([2, 0, 0, 2, 1, 2])
    words = torch.tensor([[[1, 2], [3, -1]]]).expand(len(index), -1, -1)
    text = (batch.input_ids, batch.attention_mask, words)
    shared = model.word_maps(batch.images[:3], *text, kind=kind, kv_index=index)
    torch.testing.assert_close(shared, model.word_maps(batch.images[index], *text, kind=kind))


def test_recomputed_maps_equal_those_of_the_step():
    """`recompute` gives the map and gradients of `online`; `momentum` gives another map."""
    results = {}
    for source in ("online", "recompute", "momentum"):
        model, batch = small_model(cam_source=source).double(), small_batch(dtype=torch.float64)
        output = model(batch, draws=small_draws(batch))
        output.loss.backward()
        results[source] = output.image_weight, gradients(model)
        assert not any(p.grad is not None for p in model.momentum_encoder.parameters())
    online, again, momentum = (weight for weight, _ in results.values())
    torch.testing.assert_close(again, online)
    assert worst_error(results["recompute"][1], results["online"][1]) < 1e-9
    assert (momentum - online).abs().max() > 1e-3


def test_momentum_map_with_equal_weights_equals_the_online_map():
    """With the student's weights in the momentum encoder, its map is the student's."""
    weights = []
    for source in ("online", "momentum"):
        model, batch = small_model(cam_source=source).double(), small_batch(dtype=torch.float64)
        model.momentum_encoder.load_state_dict(model.backbone.state_dict())
        weights.append(model(batch, alpha=0.0, draws=small_draws(batch)).image_weight)
    torch.testing.assert_close(*weights)


@needs_cpp
def test_activations_are_recomputed_by_the_same_backend() -> None:
    """The backward starts outside the context, where "auto" would take C++, which saves other tensors."""
    model, batch = small_model().double(), small_batch(dtype=torch.float64)
    model.set_activation_checkpointing(True)
    with softmask.backend("reference"):
        loss = model(batch).loss
    loss.backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.backbone.fusion.layers[0].cross_attention.query.weight.grad.any()


@pytest.mark.parametrize("cam_source", ["online", "recompute"])
def test_activation_checkpointing_changes_nothing(cam_source):
    results = []
    for checkpointing in (False, True):
        model = small_model(text={"dropout": 0.1, "attention_dropout": 0.1}, cam_source=cam_source)
        model.set_activation_checkpointing(checkpointing)
        torch.manual_seed(3)
        output = model(small_batch())
        output.loss.backward()
        results.append((output.loss, gradients(model)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    for name, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("mask_text", ["all", "mlm"])
def test_without_momentum_the_model_is_its_own_teacher_and_the_momentum_encoder_encodes_nothing(mask_text):
    """Loss, features and gradients are those of a momentum encoder with equal weights."""
    results = []
    for momentum in (0.5, 0.0):
        model = small_model(momentum=momentum, mask_text=mask_text, alpha=0.4, cam_source="momentum").double()
        model.momentum_encoder.load_state_dict(model.backbone.state_dict())
        calls = []
        for part in (model.momentum_encoder.vision, model.momentum_encoder.text):
            part.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        batch = small_batch(dtype=torch.float64)
        output = model(batch, draws=small_draws(batch))
        output.loss.backward()
        assert len(calls) == (2 if momentum else 0) and not output.image_teacher.requires_grad
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append(found | {"loss": output.loss, "image": output.image_teacher, "text": output.text_teacher})
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=name)


def test_momentum_encoder_and_queue_updates():
    model, batch = small_model(), small_batch()
    before = {name: p.clone() for name, p in model.momentum_encoder.named_parameters()}
    model.update_momentum()
    for name, parameter in model.momentum_encoder.named_parameters():
        student = dict(model.backbone.named_parameters())[name]
        torch.testing.assert_close(parameter, 0.995 * before[name] + 0.005 * student, rtol=1e-5, atol=1e-7)
        assert not parameter.requires_grad
    queue = model.contrast.image_queue.clone()
    output = model(batch)
    assert torch.equal(model.contrast.image_queue, queue), "the forward pass must not touch the queue"
    model.enqueue(output)
    assert torch.equal(model.contrast.image_queue[:6], output.image_teacher)
    assert torch.equal(model.contrast.image_queue[6:], queue[6:])
    assert torch.equal(model.contrast.queue_ids[:6], batch.image_id)


def test_training_lowers_the_loss_and_every_parameter_has_a_gradient():
    model, batch = small_model(spread=1.0), small_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(12):
        torch.manual_seed(step % 2)
        output = model(batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])
    # token type 1 and positions past the captions are the only unused rows; no whole tensor is unused
    student = {n for n, p in model.named_parameters() if p.requires_grad}
    assert student == set(gradients(model))


@pytest.mark.parametrize("mask_text", ["all", "mlm"])
def test_without_fusion_the_loss_is_the_contrastive_term_of_whole_captions(mask_text):
    model = small_model(mask_text="mlm")
    torch.manual_seed(2)
    whole = model(small_batch(), alpha=0.4).terms["itc"]
    model = small_model(mask_text=mask_text)
    torch.manual_seed(2)
    output = model(small_batch(), alpha=0.4, fuse=False)
    output.loss.backward()
    assert output.terms.keys() == {"itc", "temperature"}
    assert torch.equal(output.loss.detach(), whole)
    reached = {name.split(".")[1] for name in gradients(model) if name.startswith("backbone.")}
    assert reached == {"vision", "text", "image_projection", "text_projection"}


def test_negatives_are_drawn_at_their_own_temperature():
    logits = []
    for temperature in (0.0, 0.5):
        model = small_model(negative_temperature=temperature, temperature=0.1).eval()
        batch = small_batch()
        logits.append(model.negative_logits(model._encode(batch, 0.4, small_draws(batch), fuse=True)))
    for itc, own in zip(*logits, strict=True):
        torch.testing.assert_close(itc * 0.1, own * 0.5)
        assert (own.abs() <= 2.0 + 1e-5).all()


def test_clamped_temperature_keeps_a_gradient():
    model, batch = small_model(), small_batch()
    with torch.no_grad():
        model.temperature.fill_(1e-5)
    output = model(batch)
    assert output.terms["temperature"].item() == pytest.approx(0.001)
    output.loss.backward()
    assert model.temperature.grad.abs() > 0


@pytest.mark.parametrize("pool", ["mean", "words"])
def test_mean_pooling_and_a_fixed_temperature(pool):
    """Pooling over words leaves out CLS and SEP, where a caption has other tokens."""
    model, batch = small_model(text={"pool": pool}, learn_temperature=False), small_batch()
    length = torch.arange(batch.attention_mask.shape[1])
    batch.attention_mask[1] = length < 2  # CLS and SEP alone
    last = int(batch.attention_mask[2].sum()) - 1
    batch.attention_mask[2, last] = False  # no SEP, as with data.append_sep=false
    batch.input_ids[1, 1] = model.special_ids.sep
    batch.num_tokens = int(batch.attention_mask.sum())
    model.eval()
    with torch.no_grad():
        tokens, feature = model.encode_text(batch.input_ids, batch.attention_mask)
    rows = [row[mask] for row, mask in zip(tokens, batch.attention_mask, strict=True)]
    if pool == "words":
        rows = [row if i == 1 else row[1:] if i == 2 else row[1:-1] for i, row in enumerate(rows)]
    mean = torch.stack([row.mean(0) for row in rows])
    expected = torch.nn.functional.normalize(model.backbone.text_projection(mean), dim=-1)
    torch.testing.assert_close(feature, expected)
    model(batch).loss.backward()
    assert model.temperature.grad is None
    with pytest.raises(ValueError, match="pool: expected 'cls', 'mean' or 'words', got 'max'"):
        small_config(text={"pool": "max"})


def test_bfloat16_autocast_is_near_fp32():
    model, batch = small_model(spread=2.0), small_batch()
    torch.manual_seed(0)
    exact = model(batch)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(batch)
    rough.loss.backward()
    # bfloat16 has 8 bits: terms of a few layers agree to some multiple of 2**-8
    assert abs(rough.terms["itc"] - exact.terms["itc"]) < 2**-4 * exact.terms["itc"]
    assert all(torch.isfinite(g).all() for g in gradients(model).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cam_layer": 2}, "cam_layer"),
        ({"mask_text": "none"}, "mask_text"),
        ({"cam_source": "none"}, "cam_source"),
        ({"text": {"heads": 5}}, "text.width"),
        ({"text": {"fusion_layers": 0}}, "fusion_layers"),
    ],
)
def test_bad_configuration_names_the_key(options, message):
    with pytest.raises(ValueError, match=message):
        small_config(**options)


def test_bad_batches_and_vocabulary_are_refused():
    with pytest.raises(ValueError, match="at least 2 pairs"):
        small_model()(small_batch(1))
    with pytest.raises(ValueError, match="vocab_size"):
        SoftMaskPP(small_config(text={"vocab_size": 0}), special_ids=SPECIAL)
    with pytest.raises(ValueError, match="max_positions"):
        model = small_model(text={"max_positions": 8})
        model(small_batch())


def _itc_step(model, batch) -> dict[str, torch.Tensor]:
    """ITC alone (negatives of ITM are drawn from the rank's own rows), then the queue."""
    model.config.weights.itm = model.config.weights.itm_soft = model.config.weights.mlm = 0.0
    output = model(batch)
    output.loss.backward()
    model.enqueue(output)
    result = {f"grad.{n}": g for n, g in gradients(model).items()}
    return result | {"itc": output.terms["itc"], "queue": model.contrast.image_queue, "ids": model.contrast.queue_ids}


def _on_rank(rank: int) -> dict[str, torch.Tensor]:
    model = small_model(mask_probability=0.0, share_positives=True).double()
    return _itc_step(model, own_rows(small_batch(8, dtype=torch.float64), rank))


def test_two_ranks_equal_one_in_itc_gradients_and_queue(tmp_path):
    ranks = run_on_two_ranks(_on_rank, tmp_path)
    model = small_model(mask_probability=0.0, share_positives=True).double()
    single = _itc_step(model, small_batch(8, dtype=torch.float64))
    for name, value in single.items():
        if name in ("queue", "ids"):
            torch.testing.assert_close(ranks[0][name], value)
            torch.testing.assert_close(ranks[1][name], value)
        else:
            torch.testing.assert_close((ranks[0][name] + ranks[1][name]) / 2, value, msg=name)
