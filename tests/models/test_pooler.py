"""CoCa's attentional pooler, and how SyCoCa uses it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmask.models.layers.pooler import AttentionalPooler
from tests.support.model_fixtures import COCA, POOLED, small_batch, small_sycoca


def plain_pooler(pooler: AttentionalPooler) -> nn.Module:
    """open_clip's AttentionalPooler and the norm after it, by nn.MultiheadAttention."""
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
def test_pooler_equals_open_clip(library: str) -> None:
    torch.manual_seed(0)
    pooler = AttentionalPooler(24, 3, queries=4, library=library).double()
    for parameter in pooler.parameters():
        nn.init.normal_(parameter)
    tokens = torch.randn(2, 7, 24, dtype=torch.float64)
    pooled = pooler(tokens)
    assert pooled.shape == (2, 5, 24)
    torch.testing.assert_close(pooled, plain_pooler(pooler)(tokens))
    torch.testing.assert_close(pooler.each(tokens)[1, 3], pooler(tokens[1:, 3:4])[0, 2])


def test_first_query_is_contrasted_and_the_others_go_to_the_caption_decoder() -> None:
    model, batch = small_sycoca(**COCA, **POOLED), small_batch(dtype=torch.float64)
    image = model.backbone.vision(batch.images)
    pooled = model.backbone.pooler(image)
    first, context = model.backbone.pool(image)
    feature = model.backbone.image_feature(first)
    torch.testing.assert_close(feature, F.normalize(model.backbone.image_projection(pooled[:, 0]), dim=-1))
    assert torch.equal(context, pooled[:, 1:]) and context.shape == (6, 5, 24)
    texts, output = model.encode_texts(batch), model(batch)
    similarity, own = model.logit_scale.exp() * feature @ texts.feature.T, torch.arange(6)
    itc = (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2
    torch.testing.assert_close(output.terms["itc"], itc.detach())
    model.zero_grad()
    output.loss.backward()
    both = model.backbone.pooler.queries.grad.abs().amax(1)
    assert (both > 0).all()
    model.zero_grad()
    _, context = model.backbone.pool(model.backbone.vision(batch.images))
    model.caption_loss(batch, model.encode_texts(batch), context).backward()
    by_caption = model.backbone.pooler.queries.grad.abs().amax(1)
    assert by_caption[0] == 0 and (by_caption[1:] > 0).all()


def test_relevance_of_a_patch_is_that_of_pooling_it_alone() -> None:
    model, batch = small_sycoca(caption_masking="none", **POOLED), small_batch(dtype=torch.float64)
    image, texts = model.backbone.vision(batch.images), model.encode_texts(batch)
    backbone = model.backbone
    features = [backbone.image_feature(backbone.pool(image[:, 1 + patch : 2 + patch])[0]) for patch in range(16)]
    tokens = F.normalize(model.backbone.text_projection(texts.packing.pad(texts.tokens)), dim=-1)
    relevance = (torch.stack(features, dim=1) @ tokens.transpose(1, 2)).masked_fill(~texts.packing.mask[:, None], -2.0)
    expected = torch.zeros(6, 16, dtype=torch.bool).scatter(1, relevance.amax(-1).topk(8).indices, True)
    assert torch.equal(model.masks(image, texts).hidden, expected)
