"""`text.style: open_clip`: the towers and the initialization of open_clip's CoCa."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmask.models import CausalTextConfig, SyCoCa, SyCoCaConfig, VisionConfig
from softmask.models.layers.packing import Packed, Packing
from softmask.models.layers.transformer import Block
from tests.support.model_fixtures import COCA, SPECIAL, VOCABULARY, small_batch, small_sycoca

WIDTH, HEADS, LAYERS, LENGTH = 256, 4, 3, 12  # the width of the smallest ViT of CLIP's kind


def model_of(style: str, *, vit: str = "vit_xsmall_patch16_clip_224", **options) -> SyCoCa:
    torch.manual_seed(0)
    text = CausalTextConfig(
        vocab_size=VOCABULARY, width=WIDTH, heads=HEADS, layers=LAYERS, decoder_layers=LAYERS, max_positions=LENGTH,
        style=style,
    )  # fmt: skip
    vision = VisionConfig(name=vit, image_size=36, patch_size=18)
    return SyCoCa(SyCoCaConfig(vision=vision, text=text, embed_dim=32, **(COCA | options)), special_ids=SPECIAL)


def copy_block(block: Block, theirs: nn.Module) -> None:
    """From an open_clip ResidualAttentionBlock."""
    attention, up, down = block.attention, theirs.mlp.c_fc, theirs.mlp.c_proj
    weights, biases = theirs.attn.in_proj_weight.chunk(3), theirs.attn.in_proj_bias.chunk(3)
    for layer, weight, bias in zip((attention.query, attention.key, attention.value), weights, biases, strict=True):
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    pairs = [(attention.output, theirs.attn.out_proj), (attention.norm, theirs.ln_1), (block.feed_forward.up, up)]
    pairs += [(block.feed_forward.down, down), (block.feed_forward.norm, theirs.ln_2)]
    if attention.source_norm is not None:
        pairs.append((attention.source_norm, theirs.ln_1_kv))
    for ours, other in pairs:
        ours.load_state_dict(other.state_dict())


@torch.no_grad()
def test_text_tower_and_decoder_equal_open_clip() -> None:
    """With `correct_cls_mask`: without it, open_clip's mask is shifted by one and [CLS] sees padding, not itself."""
    towers = pytest.importorskip("open_clip.transformer")
    sizes = {"width": WIDTH, "heads": HEADS, "layers": LAYERS, "context_length": LENGTH}
    text = towers.TextTransformer(
        **sizes, vocab_size=VOCABULARY, output_dim=32, embed_cls=True, correct_cls_mask=True, output_tokens=True,
        pad_id=SPECIAL.pad,
    ).double()  # fmt: skip
    decoder = towers.MultimodalTransformer(**sizes, output_dim=VOCABULARY).double()
    nn.init.normal_(decoder.text_projection, std=0.1)
    model = model_of("open_clip").double()
    for block, theirs in zip(model.backbone.text.blocks, text.transformer.resblocks, strict=True):
        copy_block(block, theirs)
    model.backbone.text.word.weight.copy_(text.token_embedding.weight)
    model.backbone.text.position.weight.copy_(text.positional_embedding)
    model.backbone.text.cls.copy_(text.cls_emb)
    model.backbone.text.norm.load_state_dict(text.ln_final.state_dict())
    model.backbone.text_projection.weight.copy_(text.text_projection.T)
    ours = model.caption_decoder
    for stack, theirs in ((ours.own, decoder.resblocks), (ours.cross, decoder.cross_attn)):
        for block, other in zip(stack, theirs, strict=True):
            copy_block(block, other)
    ours.norm.load_state_dict(decoder.ln_final.state_dict())
    model.caption_head.weight.copy_(decoder.text_projection.T)
    batch = small_batch(length=LENGTH, dtype=torch.float64)
    padded = F.pad(batch.input_ids, (0, LENGTH - batch.input_ids.shape[1]), value=SPECIAL.pad)
    feature, tokens = text(padded)
    read = model.encode_texts(batch)
    torch.testing.assert_close(read.feature, F.normalize(feature, dim=-1))
    torch.testing.assert_close(read.tokens, tokens[:, : batch.input_ids.shape[1]][batch.attention_mask])
    image = torch.randn(len(padded), 5, WIDTH, dtype=torch.float64)
    logits = decoder(image, tokens)[:, : batch.input_ids.shape[1]][batch.attention_mask]
    states = ours(read, Packed.full(image))
    torch.testing.assert_close(model.caption_head(states), logits)


@torch.no_grad()
def test_image_encoder_equals_open_clip() -> None:
    """A timm ViT of CLIP's kind has a norm before its blocks and no bias in the patch embedding."""
    towers = pytest.importorskip("open_clip.transformer")
    model = model_of("open_clip")
    vit = model.backbone.vision.vit
    theirs = towers.VisionTransformer(
        image_size=36, patch_size=18, width=vit.embed_dim, layers=len(vit.blocks), heads=vit.blocks[0].attn.num_heads,
        mlp_ratio=4.0, output_dim=32, output_tokens=True,
    )  # fmt: skip
    theirs.conv1.weight.copy_(vit.patch_embed.proj.weight)
    assert vit.patch_embed.proj.bias is None
    theirs.class_embedding.copy_(vit.cls_token[0, 0])
    theirs.positional_embedding.copy_(vit.pos_embed[0])
    pairs = [(theirs.ln_pre, vit.norm_pre), (theirs.ln_post, vit.norm)]
    for block, timms in zip(theirs.transformer.resblocks, vit.blocks, strict=True):
        block.attn.in_proj_weight.copy_(timms.attn.qkv.weight)
        block.attn.in_proj_bias.copy_(timms.attn.qkv.bias)
        pairs += [(block.attn.out_proj, timms.attn.proj), (block.mlp.c_fc, timms.mlp.fc1)]
        pairs += [(block.mlp.c_proj, timms.mlp.fc2), (block.ln_1, timms.norm1), (block.ln_2, timms.norm2)]
    for other, ours in pairs:
        other.load_state_dict(ours.state_dict())
    theirs.proj.copy_(model.backbone.image_projection.weight.T)
    images = torch.randn(2, 3, 36, 36)
    pooled, tokens = theirs.eval()(images)
    ours, feature = model.eval().encode_image(images)
    torch.testing.assert_close(ours[:, 1:], tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(feature, F.normalize(pooled, dim=-1), rtol=1e-4, atol=1e-5)


def spreads(blocks: list[Block]) -> dict[str, Tensor]:
    """Standard deviation of each kind of weights, over all blocks."""
    kinds = {"within": [], "added": [], "up": []}
    for block in blocks:
        kinds["within"] += [block.attention.query.weight, block.attention.key.weight, block.attention.value.weight]
        kinds["added"] += [block.attention.output.weight, block.feed_forward.down.weight]
        kinds["up"].append(block.feed_forward.up.weight)
    return {kind: torch.cat([weight.flatten() for weight in weights]).std() for kind, weights in kinds.items()}


@pytest.mark.parametrize("style", ["own", "open_clip"])
def test_weights_are_initialized_by_style(style: str) -> None:
    model = model_of(style, vit="vit_tiny_patch16_224", reconstruct=True, image_decoder_heads=3)
    for stack, width, layers in (
        (model.backbone.text.blocks, WIDTH, LAYERS),
        ([*model.caption_decoder.own, *model.caption_decoder.cross], WIDTH, LAYERS),
        ([*model.image_decoder.own, *model.image_decoder.cross], 192, 4),
    ):
        expected = {"within": 0.02, "added": 0.02, "up": 0.02}
        if style == "open_clip":
            expected = {"within": width**-0.5, "added": (2 * width * layers) ** -0.5, "up": (2 * width) ** -0.5}
        found = spreads(list(stack))
        assert all(found[kind].item() == pytest.approx(std, rel=0.05) for kind, std in expected.items())
    for layer, width in (
        (model.caption_head, WIDTH),
        (model.backbone.text_projection, WIDTH),
        (model.backbone.image_projection, 192),
    ):
        expected = width**-0.5 if style == "open_clip" else 0.02
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.05)


def test_open_clip_style_normalizes_only_cls_and_places_it_last() -> None:
    own, theirs = small_sycoca(**COCA), small_sycoca(**COCA, style="open_clip")
    theirs.load_state_dict(own.state_dict())
    batch = small_batch(dtype=torch.float64)
    first, second = (model.encode_texts(batch) for model in (own, theirs))
    torch.testing.assert_close(first.tokens, theirs.backbone.text.norm(second.tokens))
    assert not torch.allclose(first.tokens, second.tokens) and not torch.allclose(first.feature, second.feature)
    positions = theirs.backbone.text._positions(Packing.of(batch.attention_mask))
    assert (positions[:, -1] == theirs.backbone.text.position.num_embeddings - 1).all()
    assert torch.equal(positions[:, :-1], own.backbone.text._positions(Packing.of(batch.attention_mask))[:, :-1])
