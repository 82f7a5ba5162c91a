"""SyCoCa: losses against open_clip's CoCa, what the masks hide, causal text, gradients of every parameter."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from softmask import ops
from softmask.models import CausalTextConfig, SyCoCa
from softmask.models.layers.packing import Packed
from softmask.models.sycoca.config import SyCoCaWeights
from tests.support.model_fixtures import COCA, POOLED, SPECIAL, VOCABULARY, small_batch, small_sycoca


def dense_logits(model: SyCoCa, batch) -> Tensor:
    """[B, T - 1, vocabulary] of the caption decoder that sees the whole image, zeros at padding."""
    image, texts = model.backbone.vision(batch.images), model.encode_texts(batch)
    states = model.caption_decoder(texts, Packed.full(image))
    return texts.packing.pad(model.caption_head(states))[:, :-1]


def coca_losses(image: Tensor, text: Tensor, logits: Tensor, labels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Contrastive and caption loss with CoCa's weights, 1 and 2."""
    similarity, own = scale * image @ text.T, torch.arange(len(image))
    contrastive = (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2
    return contrastive, 2.0 * F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=SPECIAL.pad)


def open_clip_losses(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    loss = pytest.importorskip("open_clip.loss").CoCaLoss(
        caption_loss_weight=2.0, clip_loss_weight=1.0, pad_id=SPECIAL.pad
    )
    return loss(*arguments)


@pytest.mark.parametrize("losses", [coca_losses, open_clip_losses])
def test_without_masks_and_reconstruction_the_losses_equal_coca(losses) -> None:
    model, batch = small_sycoca(**COCA), small_batch(dtype=torch.float64)
    output = model(batch)
    _, image = model.encode_image(batch.images)
    features = image, model.encode_texts(batch).feature
    logits, labels = dense_logits(model, batch), batch.input_ids[:, 1:]
    contrastive, caption = losses(*features, logits, labels, model.logit_scale.exp())
    torch.testing.assert_close(output.terms["itc"], contrastive)
    torch.testing.assert_close(2.0 * output.terms["caption"], caption)
    torch.testing.assert_close(output.loss, contrastive + caption)


def test_no_token_sees_a_later_one_and_cls_sees_all() -> None:
    model, batch = small_sycoca().eval(), small_batch(dtype=torch.float64)
    changed = copy.deepcopy(batch)
    row, last = 1, int(batch.attention_mask[1].sum()) - 1
    changed.input_ids[row, last - 1] = 4 + (batch.input_ids[row, last - 1] - 3) % (VOCABULARY - 4)
    before, after = (model.encode_texts(one) for one in (batch, changed))
    one, two = (texts.packing.pad(texts.tokens)[row] for texts in (before, after))
    torch.testing.assert_close(one[: last - 1], two[: last - 1])
    assert (one[last - 1] - two[last - 1]).abs().max() > 1e-3
    assert (before.feature[row] - after.feature[row]).abs().max() > 1e-3
    torch.testing.assert_close(before.feature[0], after.feature[0])


def test_padding_changes_nothing() -> None:
    model, batch = small_sycoca().eval(), small_batch(dtype=torch.float64)
    longer = dataclasses.replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, 3), value=SPECIAL.pad),
        attention_mask=F.pad(batch.attention_mask, (0, 3)),
    )
    torch.testing.assert_close(model.encode_texts(batch).feature, model.encode_texts(longer).feature)


def test_training_reads_captions_as_evaluation_does() -> None:
    """Including [SEP] of the longest caption, whatever else is in the batch."""
    model, batch = small_sycoca().eval(), small_batch(dtype=torch.float64)
    _, features = model.encode_text(batch.input_ids, batch.attention_mask)
    torch.testing.assert_close(model.encode_texts(batch).feature, features)
    alone = dataclasses.replace(batch, input_ids=batch.input_ids[:1], attention_mask=batch.attention_mask[:1])
    torch.testing.assert_close(model.encode_texts(alone).feature, features[:1])


@pytest.mark.parametrize("inverse", [200.0, 14.0])
def test_clamped_temperature_keeps_a_gradient(inverse: float) -> None:
    model = small_sycoca()
    model.logit_scale.data.fill_(inverse).log_()
    scale = model.scale()
    torch.testing.assert_close(scale.detach(), torch.tensor(min(inverse, 100.0), dtype=torch.float64))
    scale.backward()
    assert model.logit_scale.grad > 0


@pytest.mark.parametrize("logit_scale", [10.0, 20.0, 30.0, 90.0])
def test_temperature_far_beyond_the_limit_keeps_scale_and_gradient(logit_scale: float) -> None:
    """In fp32, where a clamp by a difference of large numbers would lose the value."""
    model = small_sycoca().float()
    model.logit_scale.data.fill_(logit_scale)
    scale = model.scale()
    scale.backward()
    assert scale.item() == pytest.approx(100.0, rel=1e-5)
    assert model.logit_scale.grad.item() == pytest.approx(100.0, rel=1e-5)


def test_captions_are_decoded_only_from_the_relevant_patches() -> None:
    model, batch = small_sycoca(), small_batch(dtype=torch.float64)
    image, texts = model.backbone.vision(batch.images).detach().requires_grad_(), model.encode_texts(batch)
    kept = model.masks(image, texts).kept
    assert (kept.sum(1) == 8).all()
    model.caption_loss(batch, texts, model.decoder_context(image, image, kept, None)).backward()
    seen = image.grad.abs().amax(-1)[:, 1:] > 0
    assert torch.equal(seen, kept)


def test_reconstruction_does_not_see_masked_pixels() -> None:
    """The caption and the other patches do change it."""
    model = small_sycoca(vit="vit_tiny_patch16_224", image_size=64, image_decoder_heads=3).eval()
    batch = small_batch(dtype=torch.float64)
    images = torch.randn(6, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    masked = torch.arange(16).expand(6, -1) % 3 == 0
    pixels = masked.view(6, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    with torch.no_grad():
        caption, other = ((one.input_ids, one.attention_mask) for one in (batch, _shuffled(batch)))
        prediction = model.reconstruct(images, masked, *caption)
        assert prediction.shape == (6, 16, 768)
        torch.testing.assert_close(model.reconstruct(images.where(~pixels, 9.0), masked, *caption), prediction)
        for changed in (
            model.reconstruct(images.where(pixels, 9.0), masked, *caption),
            model.reconstruct(images, masked, *other),
        ):
            assert (changed - prediction).abs().max() > 1e-3


def test_reconstruction_loss_equals_that_of_reconstruct() -> None:
    """The loss runs the image decoder's last layer for masked patches only: value and gradients must not differ."""
    model, batch = small_sycoca(image_decoder_layers=2), small_batch(dtype=torch.float64)
    masked = torch.rand(6, 16, generator=torch.Generator().manual_seed(0)).argsort(1) < 8

    def whole() -> Tensor:
        prediction = model.reconstruct(batch.images, masked, batch.input_ids, batch.attention_mask)
        return ops.masked_patch_loss(prediction, batch.images, masked, patch_size=8)

    def trained() -> Tensor:
        image = model.backbone.vision(batch.images, masked=masked, mask_token=model.mask_token)
        return model.reconstruction_loss(batch, model.encode_texts(batch), image, masked)

    found = []
    for loss in (whole, trained):
        model.zero_grad()
        value = loss()
        value.backward()
        found.append([value.detach()] + [p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*found)


def _shuffled(batch):
    return dataclasses.replace(batch, input_ids=batch.input_ids.flip(0), attention_mask=batch.attention_mask.flip(0))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"masks": "random"},
        {"relevance": "tokens", "width": 32},
        {"gamma": 2.0},
        COCA,
        COCA | POOLED,
        {"caption_masking": "pixels", "caption_ratio": 0.75, "reconstruct_masking": "tokens"},
        {"caption_masking": "pixels", "reconstruct": False},
        {"caption_masking": "pixels"} | POOLED,
        {"queue_size": 12},
    ],
    ids=str,
)
def test_every_parameter_has_a_gradient_and_training_lowers_the_loss(options: dict) -> None:
    model, batch = small_sycoca(**options), small_batch(dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(10):
        torch.manual_seed(3)
        output = model(batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.9 * losses[0]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []
    expected = {"itc", "caption", "temperature"} | ({"tgmim"} if model.config.reconstruct else set())
    assert output.terms.keys() == expected


def test_caption_loss_of_weight_0_is_not_computed() -> None:
    model, batch = small_sycoca(**COCA, weights=SyCoCaWeights(caption=0.0)), small_batch(dtype=torch.float64)
    output, with_captions = model(batch), small_sycoca(**COCA)(batch)
    output.loss.backward()
    assert output.terms.keys() == {"itc", "temperature"}
    assert output.loss.item() == output.terms["itc"].item() == with_captions.terms["itc"].item()
    without = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {"caption_decoder", "caption_head"}


def test_reconstruction_of_weight_0_is_not_computed() -> None:
    model, batch = small_sycoca(weights=SyCoCaWeights(tgmim=0.0)), small_batch(dtype=torch.float64)
    output, with_it = model(batch), small_sycoca()(batch)
    output.loss.backward()
    assert output.terms.keys() == {"itc", "caption", "temperature"}
    assert all(output.terms[name] == with_it.terms[name] for name in output.terms)
    without = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {"image_decoder", "pixel_head", "mask_token"}


@pytest.mark.parametrize("options", [{}, COCA], ids=str)
def test_activation_checkpointing_changes_nothing(options: dict) -> None:
    model, batch = small_sycoca(**options).eval(), small_batch(dtype=torch.float64)
    found = []
    for enable in (False, True):
        model.set_activation_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(0)
        loss = model(batch).loss
        loss.backward()
        found.append([loss.detach()] + [p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*found)
    assert model.backbone.text.activation_checkpointing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": "some"}, "masks: expected 'attentive' or 'random', got 'some'"),
        ({"temperature": 2.0}, "temperature"),
        ({"temperature": 0.005}, r"temperature: expected a number in \[0.01, 0.5\], got 0.005"),
        ({"image_decoder_heads": 5}, "image_decoder_heads: expected a divisor of the image encoder's width 24, got 5"),
        ({"relevance": "tokens"}, r"relevance: expected 'projection' where widths differ \(24 and 32\)"),
        ({"relevance_tokens": "some"}, "relevance_tokens: expected 'all' or 'words', got 'some'"),
        ({"reconstruct_ratio": 0.02}, "reconstruct_ratio: expected some but not all of 16, got 0.02"),
        ({"caption_ratio": 0.98}, "caption_ratio: expected some but not all of 16, got 0.98"),
    ],
)
def test_bad_configuration_names_the_key(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_sycoca(**options)


@pytest.mark.parametrize("name", ["layers", "decoder_layers"])
def test_text_without_layers_and_negative_weight_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        CausalTextConfig(**{name: 0})
    with pytest.raises(ValueError, match="caption: expected a number >= 0, got -1.0"):
        SyCoCaWeights(caption=-1.0)


def test_patch_projection_equals_that_of_an_image_of_one_patch() -> None:
    model = small_sycoca(pool="mean")
    tokens, prefix = model.backbone.vision(small_batch(dtype=torch.float64).images), model.num_prefix_tokens
    found = model.backbone.project_patches(tokens[:, prefix:])
    for patch in (0, 7):
        alone = torch.cat([tokens[:, :prefix], tokens[:, prefix + patch, None]], dim=1)
        torch.testing.assert_close(found[:, patch], model.backbone.image_projection(model.backbone.vision.pool(alone)))
