"""What each option of SyCoCa changes, and that it changes nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from model_fixtures import COCA, POOLED, small_batch, small_sycoca
from torch import Tensor, nn

from softmask import ops
from softmask.models import SyCoCa
from softmask.models.pooler import AttentionalPooler
from softmask.models.sycoca_encoders import Texts
from softmask.models.sycoca_masks import random_masks

# -- the pooler -------------------------------------------------------------------------------------------------------


def plain_pooler(pooler: AttentionalPooler) -> nn.Module:
    """open_clip's AttentionalPooler and the norm behind it, by nn.MultiheadAttention."""
    width = pooler.queries.shape[1]
    attention = nn.MultiheadAttention(width, pooler.heads, batch_first=True).to(pooler.queries.dtype)
    inputs = (pooler.query, pooler.key, pooler.value)
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([layer.weight for layer in inputs]))
        attention.in_proj_bias.copy_(torch.cat([layer.bias for layer in inputs]))
        attention.out_proj.load_state_dict(pooler.output.state_dict())

    def run(tokens: Tensor) -> Tensor:
        source = pooler.source_norm(tokens)
        query = pooler.query_norm(pooler.queries).expand(len(tokens), -1, -1)
        return pooler.norm(attention(query, source, source, need_weights=False)[0])

    return run


@pytest.mark.parametrize("library", ["sdpa", "eager"])
def test_pooler_is_open_clips(library: str) -> None:
    torch.manual_seed(0)
    pooler = AttentionalPooler(24, 3, queries=4, library=library).double()
    for parameter in pooler.parameters():
        nn.init.normal_(parameter)
    tokens = torch.randn(2, 7, 24, dtype=torch.float64)
    pooled = pooler(tokens)
    assert pooled.shape == (2, 5, 24)
    torch.testing.assert_close(pooled, plain_pooler(pooler)(tokens))
    torch.testing.assert_close(pooler.each(tokens)[1, 3], pooler(tokens[1:, 3:4])[0, 2])


def test_the_first_query_is_contrasted_and_the_others_tell_the_caption() -> None:
    model, batch = small_sycoca(**COCA, **POOLED), small_batch(dtype=torch.float64)
    image = model.vision(batch.images)
    pooled = model.pooler(image)
    first, readable = model.pool(image)
    feature = model.image_feature(first)
    torch.testing.assert_close(feature, F.normalize(model.image_projection(pooled[:, 0]), dim=-1))
    assert torch.equal(readable, pooled[:, 1:]) and readable.shape == (6, 5, 24)
    texts, output = model._encode_text(batch), model(batch)
    similarity, own = model.logit_scale.exp() * feature @ texts.feature.T, torch.arange(6)
    itc = (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2
    torch.testing.assert_close(output.terms["itc"], itc.detach())
    model.zero_grad()
    output.loss.backward()
    both = model.pooler.queries.grad.abs().amax(1)
    assert (both > 0).all()
    model.zero_grad()
    model._caption_loss(batch, model._encode_text(batch), model.pool(model.vision(batch.images))[1]).backward()
    told = model.pooler.queries.grad.abs().amax(1)
    assert told[0] == 0 and (told[1:] > 0).all()


def test_patches_are_as_relevant_as_the_pooler_finds_them_alone() -> None:
    model, batch = small_sycoca(caption_masking="none", **POOLED), small_batch(dtype=torch.float64)
    image, texts = model.vision(batch.images), model._encode_text(batch)
    features = [model.image_feature(model.pool(image[:, 1 + patch : 2 + patch])[0]) for patch in range(16)]
    tokens = F.normalize(model.text_projection(texts.packing.pad(texts.tokens)), dim=-1)
    relevance = (torch.stack(features, dim=1) @ tokens.transpose(1, 2)).masked_fill(~texts.packing.mask[:, None], -2.0)
    expected = torch.zeros(6, 16, dtype=torch.bool).scatter(1, relevance.amax(-1).topk(8).indices, True)
    assert torch.equal(model._masks(image, texts).hidden, expected)


# -- ratios -----------------------------------------------------------------------------------------------------------


def most_relevant(model: SyCoCa, image: Tensor, texts: Texts, *, count: int) -> Tensor:
    """bool [B, patches], by sorting cosines in the space of the projections."""
    patches = F.normalize(model.image_projection(image[:, 1:]), dim=-1)
    tokens = F.normalize(model.text_projection(texts.packing.pad(texts.tokens)), dim=-1)
    relevance = (patches @ tokens.transpose(1, 2)).masked_fill(~texts.packing.mask[:, None], -2.0).amax(-1)
    return torch.zeros_like(relevance, dtype=torch.bool).scatter(1, relevance.topk(count).indices, True)


def test_each_head_has_its_share_of_the_most_spoken_of() -> None:
    model, batch = small_sycoca(caption_ratio=0.25, reconstruct_ratio=0.75), small_batch(dtype=torch.float64)
    image, texts = model.vision(batch.images), model._encode_text(batch)
    masks = model._masks(image, texts)
    assert torch.equal(masks.kept, most_relevant(model, image, texts, count=4))
    assert torch.equal(masks.hidden, most_relevant(model, image, texts, count=12))


def test_random_masks_have_the_same_shares() -> None:
    torch.manual_seed(0)
    masks = random_masks(torch.empty(500, 16, 1), ratios={0.25, 0.75})
    few, many = masks[0.25], masks[0.75]
    assert (few.sum(1) == 4).all() and (many.sum(1) == 12).all() and not (few & ~many).any()
    assert (few.float().mean(0) - 0.25).abs().max() < 0.1  # five standard deviations
    assert (many.float().mean(0) - 0.75).abs().max() < 0.1


def terms(**options) -> dict[str, float]:
    """Of one step of the model with these options, whose weights are the same for all that do not add any."""
    model = small_sycoca(**options)
    torch.manual_seed(5)
    return {name: term.item() for name, term in model(small_batch(dtype=torch.float64)).terms.items()}


def changed(before: dict[str, float], after: dict[str, float]) -> set[str]:
    """The terms that differ by more than rounding."""
    assert before.keys() == after.keys()
    return {name for name in before if after[name] != pytest.approx(before[name], rel=1e-9)}


@pytest.mark.parametrize("masks", ["attentive", "random"])
def test_a_ratio_changes_its_own_head_alone(masks: str) -> None:
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
def test_equal_ratios_take_one_call(monkeypatch: pytest.MonkeyPatch, options: dict, calls: list[float]) -> None:
    called, choose = [], ops.attentive_mask

    def counted(*tensors: Tensor, ratio: float, **others) -> Tensor:
        called.append(ratio)
        return choose(*tensors, ratio=ratio, **others)

    monkeypatch.setattr(ops, "attentive_mask", counted)
    terms(**options)
    assert sorted(called) == calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption_ratio": 1.0}, r"caption_ratio: expected a number in \(0, 1\), got 1.0"),
        ({"reconstruct_ratio": 0.0}, r"reconstruct_ratio: expected a number in \(0, 1\), got 0.0"),
        ({"pooler_queries": -1}, "pooler_queries: expected at least 0, got -1"),
        ({"caption_masking": "none", "pooler_queries": 4, "pooler_heads": 0}, "pooler_heads: expected at least 1"),
        (
            {"caption_masking": "none", "pooler_queries": 4, "pooler_heads": 5},
            "pooler_heads: expected a divisor of the image encoder's width 24, got 5",
        ),
        (
            {"pooler_queries": 4},
            "caption_masking: expected 'none' where there are pooler_queries .*, got 'tokens'",
        ),
        (
            {"caption_masking": "none", "pool": "mean"} | POOLED,
            "vision.pool: expected 'cls' where there are pooler_queries .*, got 'mean'",
        ),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_sycoca(**options)
