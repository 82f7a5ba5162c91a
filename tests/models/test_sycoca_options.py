"""Each option of SyCoCa changes what it should, and nothing else."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from softmask import ops
from softmask.models import SyCoCa
from softmask.models.sycoca.backbone import Texts
from softmask.models.sycoca.config import SyCoCaConfig
from softmask.models.sycoca.masks import PatchMasks, attentive_masks, patch_positions, random_masks
from softmask.tasks.sycoca import SyCoCaTask
from tests.support.model_fixtures import COCA, POOLED, small_batch, small_sycoca

# -- ratios -----------------------------------------------------------------------------------------------------------


def most_relevant(model: SyCoCa, image: Tensor, texts: Texts, *, count: int) -> Tensor:
    """bool [B, patches], by sorting cosines in the space of the projections."""
    patches = F.normalize(model.backbone.image_projection(image[:, 1:]), dim=-1)
    tokens = F.normalize(model.backbone.text_projection(texts.packing.pad(texts.tokens)), dim=-1)
    relevance = (patches @ tokens.transpose(1, 2)).masked_fill(~texts.packing.mask[:, None], -2.0).amax(-1)
    return torch.zeros_like(relevance, dtype=torch.bool).scatter(1, relevance.topk(count).indices, True)


def test_each_ratio_masks_its_share_of_the_most_relevant_patches() -> None:
    model, batch = small_sycoca(caption_ratio=0.25, reconstruct_ratio=0.75), small_batch(dtype=torch.float64)
    image, texts = model.backbone.vision(batch.images), model.encode_texts(batch)
    masks = model.masks(image, texts)
    assert torch.equal(masks.kept, most_relevant(model, image, texts, count=4))
    assert torch.equal(masks.hidden, most_relevant(model, image, texts, count=12))


def test_relevance_tokens_words_leaves_out_cls_and_sep() -> None:
    """The causal encoder's [CLS], the first token, is the same for every caption; [SEP] is not."""
    batch = small_batch(dtype=torch.float64)
    model, by_words = small_sycoca(), small_sycoca(relevance_tokens="words")
    image, texts = model.backbone.vision(batch.images), model.encode_texts(batch)
    words = texts.packing.mask & (batch.word_ids >= 0)
    assert torch.equal(words.sum(1), texts.packing.mask.sum(1) - 2)
    rest = dataclasses.replace(texts, packing=SimpleNamespace(pad=texts.packing.pad, mask=words))
    expected = most_relevant(model, image, rest, count=8)
    assert torch.equal(by_words.masks(image, texts).hidden, expected)
    assert not torch.equal(model.masks(image, texts).hidden, expected)


def test_attentive_masks_follow_the_caption() -> None:
    """With given projections: one patch is similar to the tokens of one caption, another to those of the other."""
    patches = torch.eye(4).repeat(2, 1, 1)  # the same image twice
    tokens = torch.tensor([[[9.0, 1, 1, 0]] * 3, [[0, 1, 1, 9.0]] * 3])
    padding = torch.tensor([[False, False, True], [False, True, True]])
    masks = attentive_masks(patches, tokens, padding, ratios={0.25, 0.75})
    assert masks[0.25].int().tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    assert masks[0.75].int().tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]


def test_random_masks_have_the_given_shares() -> None:
    torch.manual_seed(0)
    masks = random_masks(torch.rand(500, 16), ratios={0.25, 0.75})
    few, many = masks[0.25], masks[0.75]
    assert (few.sum(1) == 4).all() and (many.sum(1) == 12).all() and not (few & ~many).any()
    assert (few.float().mean(0) - 0.25).abs().max() < 0.1  # five standard deviations
    assert (many.float().mean(0) - 0.75).abs().max() < 0.1


def terms(**options) -> dict[str, float]:
    """Loss terms of one step with these options; weights are equal for all options that add none."""
    model = small_sycoca(**options)
    torch.manual_seed(5)
    return {name: term.item() for name, term in model(small_batch(dtype=torch.float64)).terms.items()}


def changed(before: dict[str, float], after: dict[str, float]) -> set[str]:
    """The terms that differ by more than rounding."""
    assert before.keys() == after.keys()
    return {name for name in before if after[name] != pytest.approx(before[name], rel=1e-9)}


@pytest.mark.parametrize("masks", ["attentive", "random"])
def test_ratio_changes_only_its_own_loss(masks: str) -> None:
    before = terms(masks=masks)
    assert changed(before, terms(masks=masks, caption_ratio=0.25)) == {"caption"}
    assert changed(before, terms(masks=masks, reconstruct_ratio=0.25)) == {"tgmim"}


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({}, [0.5]),
        ({"caption_ratio": 0.25}, [0.25, 0.5]),
        ({"caption_ratio": 0.25, "reconstruct": False}, [0.25]),
        ({"reconstruct_ratio": 0.75, "caption_masking": "none"}, [0.75]),
        (COCA, []),
    ],
    ids=str,
)
def test_equal_ratios_share_one_call(monkeypatch: pytest.MonkeyPatch, options: dict, calls: list[float]) -> None:
    called, choose = [], ops.attentive_mask

    def counted(*tensors: Tensor, ratio: float, **others) -> Tensor:
        called.append(ratio)
        return choose(*tensors, ratio=ratio, **others)

    monkeypatch.setattr(ops, "attentive_mask", counted)
    terms(**options)
    assert sorted(called) == calls


# -- masks by tokens and by pixels ------------------------------------------------------------------------------------


def plain_encoding(model: SyCoCa, images: Tensor, unseen: Tensor) -> Tensor:
    """The image encoder with the mask token in place of the embeddings of the patches `unseen` [B, patches]."""
    vit = model.backbone.vision.vit
    patches = vit.patch_embed(images)
    patches = model.mask_token * unseen[..., None] + patches * ~unseen[..., None]
    return vit.norm(vit.blocks(vit._pos_embed(patches)))


def test_pixel_masks_run_a_second_encoder_pass_for_both_heads() -> None:
    vit = {"vit": "vit_tiny_patch16_224", "image_decoder_heads": 3}
    model, batch = small_sycoca(caption_masking="pixels", **vit), small_batch(dtype=torch.float64)
    seen = []
    first_block = model.backbone.vision.vit.blocks[0]
    first_block.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    masks = model.masks(model.backbone.vision(batch.images), model.encode_texts(batch))
    output = model(batch)
    assert seen == [6, 6, 12]
    for name, unseen in (("caption", ~masks.kept), ("tgmim", masks.hidden)):
        expected = plain_encoding(model, batch.images, unseen)
        torch.testing.assert_close(model._encode_masked(batch.images, masks)[name], expected)
    texts = model.encode_texts(batch)
    decoder_context = plain_encoding(model, batch.images, ~masks.kept)
    torch.testing.assert_close(output.terms["caption"], model.caption_loss(batch, texts, decoder_context).detach())


@pytest.mark.parametrize("caption_masking", ["tokens", "pixels"])
def test_a_whole_step_is_one_without_caption_masks(caption_masking: str) -> None:
    """Reconstruction keeps its masks."""
    torch.manual_seed(0)
    batch, terms = small_batch(dtype=torch.float64), []
    for masking, whole in ((caption_masking, True), ("none", False), (caption_masking, False)):
        model = small_sycoca(caption_masking=masking, vit="vit_tiny_patch16_224", image_decoder_heads=3)
        terms.append(model(batch, whole=whole).terms)
    assert all(torch.equal(terms[0][name], terms[1][name]) for name in ("itc", "caption", "tgmim"))
    assert torch.equal(terms[0]["tgmim"], terms[2]["tgmim"]) and not torch.equal(
        terms[0]["caption"], terms[2]["caption"]
    )


def test_steps_in_which_the_caption_decoder_sees_whole_images() -> None:
    def steps(**options: int) -> list[int]:
        config = SyCoCaConfig(**options)
        return [step for step in range(8) if SyCoCaTask().step_options(config, step, steps_per_epoch=1.0)["whole"]]

    assert steps() == []
    assert steps(caption_whole_steps=3) == [0, 1, 2]
    assert steps(caption_whole_steps=2, caption_whole_every=3) == [0, 1, 3, 6]
    with pytest.raises(ValueError, match="caption_whole_every: expected at least 0, got -1"):
        SyCoCaConfig(caption_whole_every=-1)


@pytest.mark.parametrize(("caption_masking", "leaks"), [("tokens", True), ("pixels", False)])
def test_caption_decoder_sees_masked_pixels_only_with_token_masks(caption_masking: str, leaks: bool) -> None:
    """With token masks they reach the caption through the encoder's self-attention, with pixel masks they do not."""
    options = {"vit": "vit_tiny_patch16_224", "image_size": 64, "image_decoder_heads": 3}
    model = small_sycoca(caption_masking=caption_masking, **options).eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = (torch.arange(16) % 2 == 0).expand(2, -1)
    pixels = kept.view(2, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)

    def decoder_context(images: Tensor) -> Tensor:
        image, masks = model.backbone.vision(images), PatchMasks(kept=kept, hidden=kept)
        encoded = model._encode_masked(images, masks).get("caption")
        return model.decoder_context(image, image, kept, encoded)

    with torch.no_grad():
        before = decoder_context(images)
        assert before.shape == (2, 9 if caption_masking == "tokens" else 17, 192)
        assert ((decoder_context(images.where(pixels, 9.0)) - before).abs().max() > 1e-3) == leaks
        assert (decoder_context(images.where(~pixels, 9.0)) - before).abs().max() > 1e-3


def test_masking_changes_only_its_own_loss() -> None:
    before = terms()
    assert changed(before, terms(caption_masking="pixels")) == {"caption"}
    assert changed(before, terms(caption_masking="none")) == {"caption"}
    assert changed(before, terms(reconstruct_masking="tokens")) == {"tgmim"}
    assert changed(before, terms(reconstruct_masking="tokens", caption_masking="pixels")) == {"caption", "tgmim"}


def test_reconstruction_from_replaced_tokens() -> None:
    model, batch = small_sycoca(reconstruct_masking="tokens"), small_batch(dtype=torch.float64)
    image, texts = model.backbone.vision(batch.images).detach().requires_grad_(), model.encode_texts(batch)
    hidden = model.masks(image, texts).hidden
    began = model.image_decoder_input(image, hidden, None)
    expected = image.detach().clone()
    for row in range(6):
        for patch in hidden[row].nonzero().flatten():
            expected[row, 1 + patch] = model.mask_token.detach() + model.patch_position[patch]
    torch.testing.assert_close(began.detach(), expected)
    prediction = model.pixel_head(model._decode_image(began, texts)).unflatten(0, began.shape[:2])[:, 1:]
    prediction.square().sum().backward()
    known = image.grad.abs().amax(-1) > 0
    assert known[:, 0].all() and torch.equal(known[:, 1:], ~hidden)
    one, other = hidden[0].nonzero().flatten()[:2]
    assert (prediction[0, one] - prediction[0, other]).abs().max() > 1e-3  # each has its position


@pytest.mark.parametrize("reconstruct_masking", ["pixels", "tokens"])
def test_reconstruct_predicts_as_in_training(reconstruct_masking: str) -> None:
    model, batch = small_sycoca(reconstruct_masking=reconstruct_masking).eval(), small_batch(dtype=torch.float64)
    masked = model.masks(model.backbone.vision(batch.images), model.encode_texts(batch)).hidden
    prediction = model.reconstruct(batch.images, masked, batch.input_ids, batch.attention_mask)
    expected = ops.masked_patch_loss(prediction, batch.images, masked, patch_size=8).detach()
    torch.testing.assert_close(model(batch).terms["tgmim"], expected)


def test_patch_positions_are_sines_of_row_and_column() -> None:
    got, turns = patch_positions((2, 3), 8), (1.0, 0.01)
    for patch in range(6):
        row, column = divmod(patch, 3)
        angles = [place * turn for place in (row, column) for turn in turns]
        expected = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)])
        torch.testing.assert_close(got[patch], expected)


# -- the queue --------------------------------------------------------------------------------------------------------


def albef_loss(students: list[Tensor], teachers: list[Tensor], queues: list[Tensor], scale: Tensor, alpha: float):
    """Contrastive loss against teacher features and a queue with soft targets, as ALBEF's code writes it."""
    losses, own = [], torch.arange(len(students[0]))
    for student, teacher, other, queue in zip(students, teachers, teachers[::-1], queues[::-1], strict=True):
        keys = torch.cat([other, queue])
        logits, hard = scale * student @ keys.T, F.one_hot(own, len(keys))
        targets = alpha * (scale * teacher @ keys.T).softmax(1) + (1 - alpha) * hard
        losses.append(-(targets * logits.log_softmax(1)).sum(1).mean())
    return sum(losses) / 2


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_queue_loss_equals_albef(alpha: float) -> None:
    model, batch = small_sycoca(queue_size=12, alpha=alpha), small_batch(dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.momentum_encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    teacher, texts = model.momentum_encoder, model.encode_texts(batch)
    feature = model.backbone.image_feature(model.backbone.pool(model.backbone.vision(batch.images))[0])
    teachers = [
        teacher.image_feature(teacher.pool(teacher.vision(batch.images))[0]),
        teacher.encode_texts(batch.input_ids, texts.packing).feature,
    ]
    queues = [model.contrast.image_queue.clone(), model.contrast.text_queue.clone()]
    output = model(batch)
    expected = albef_loss([feature, texts.feature], teachers, queues, model.logit_scale.exp(), alpha)
    torch.testing.assert_close(output.terms["itc"], expected.detach())
    assert not output.image_teacher.requires_grad and not output.text_teacher.requires_grad
    model.enqueue(output)
    torch.testing.assert_close(model.contrast.image_queue, torch.cat([teachers[0], queues[0][6:]]))
    torch.testing.assert_close(model.contrast.text_queue, torch.cat([teachers[1], queues[1][6:]]))
    assert changed(terms(), terms(queue_size=12, alpha=alpha)) == {"itc"}


@pytest.mark.parametrize("options", [{}, {"caption_masking": "none"} | POOLED], ids=["plain", "pooler"])
def test_without_momentum_the_model_is_its_own_teacher(options: dict) -> None:
    """Loss and features are those of a momentum encoder with equal weights, which encodes nothing."""
    outputs = []
    for momentum in (0.5, 0.0):
        model = small_sycoca(queue_size=12, alpha=0.4, momentum=momentum, **options)
        calls: list[int] = []
        model.momentum_encoder.vision.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        outputs.append(model(small_batch(dtype=torch.float64)))
        assert len(calls) == (momentum > 0) and not outputs[-1].text_teacher.requires_grad
    for name in ("loss", "image_teacher", "text_teacher"):
        torch.testing.assert_close(getattr(outputs[1], name), getattr(outputs[0], name), msg=name)


@pytest.mark.parametrize("options", [{}, {"caption_masking": "none"} | POOLED], ids=["plain", "pooler"])
def test_momentum_encoder_follows_the_encoders(options: dict) -> None:
    model, batch = small_sycoca(queue_size=12, momentum=0.9, **options), small_batch(dtype=torch.float64)
    encoders = model.backbone.state_dict()
    assert model.momentum_encoder.state_dict().keys() == encoders.keys()
    assert all(torch.equal(tensor, encoders[name]) for name, tensor in model.momentum_encoder.state_dict().items())
    before = {name: parameter.clone() for name, parameter in model.momentum_encoder.named_parameters()}
    model(batch).loss.backward()
    assert all(parameter.grad is None for parameter in model.momentum_encoder.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.sub_(parameter.grad)
    model.update_momentum()
    for name, parameter in model.momentum_encoder.named_parameters():
        expected = 0.9 * before[name] + 0.1 * model.backbone.get_parameter(name)
        torch.testing.assert_close(parameter, expected.detach())
    for name, buffer in model.momentum_encoder.named_buffers():
        assert torch.equal(buffer, model.backbone.get_buffer(name))
    restored = {buffer.data_ptr() for buffer in model.statistics()}
    assert restored == {b.data_ptr() for part in (model.backbone, model.momentum_encoder) for b in part.buffers()}


def test_without_a_queue_there_is_no_momentum_encoder() -> None:
    model = small_sycoca()
    assert not any(name.startswith(("momentum_encoder.", "contrast.")) for name in model.state_dict())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    output = model.eval()(small_batch(dtype=torch.float64))
    model.update_momentum()
    model.enqueue(output)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# -- precision and refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"caption_masking": "pixels", "queue_size": 12} | POOLED,
        {"caption_masking": "pixels", "reconstruct_masking": "tokens", "masks": "random"},
    ],
    ids=str,
)
def test_bf16_autocast_gives_the_same_terms(options: dict) -> None:
    model, batch = small_sycoca(**options).float(), small_batch()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    values = []
    for enabled in (False, True):
        model.load_state_dict(before)
        torch.manual_seed(5)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = model(batch)
        output.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        values.append({name: term.item() for name, term in output.terms.items()})
    assert values[1] == pytest.approx(values[0], rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption_ratio": 1.0}, r"caption_ratio: expected a number in \(0, 1\), got 1.0"),
        ({"reconstruct_ratio": 0.0}, r"reconstruct_ratio: expected a number in \(0, 1\), got 0.0"),
        ({"caption_masking": "words"}, "caption_masking: expected 'tokens', 'pixels' or 'none', got 'words'"),
        ({"reconstruct_masking": "none"}, "reconstruct_masking: expected 'pixels' or 'tokens', got 'none'"),
        (
            {"reconstruct_masking": "tokens", "width": 26},
            "reconstruct_masking: 'tokens' needs an image encoder whose width is a multiple of 4, got 26",
        ),
        ({"queue_size": -1}, "queue_size: expected at least 0, got -1"),
        ({"momentum": 1.5}, r"momentum: expected a number in \[0, 1\], got 1.5"),
        ({"alpha": -0.1}, r"alpha: expected a number in \[0, 1\], got -0.1"),
        ({"pooler_queries": -1}, "pooler_queries: expected at least 0, got -1"),
        ({"caption_masking": "none", "pooler_queries": 4, "pooler_heads": 0}, "pooler_heads: expected at least 1"),
        (
            {"caption_masking": "none", "pooler_queries": 4, "pooler_heads": 5},
            "pooler_heads: expected a divisor of the image encoder's width 24, got 5",
        ),
        (
            {"pooler_queries": 4},
            "caption_masking: expected 'pixels' or 'none' with pooler_queries .*, got 'tokens'",
        ),
        (
            {"caption_masking": "none", "pool": "mean"} | POOLED,
            "vision.pool: expected 'cls' with pooler_queries .*, got 'mean'",
        ),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_sycoca(**options)
