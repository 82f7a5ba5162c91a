"""A SoftMask++ and a SyCoCa of a few thousand weights and a batch for them."""

from __future__ import annotations

import torch

from softmask.data import Batch
from softmask.models import (
    CausalTextConfig,
    ConvViTConfig,
    SoftMaskPP,
    SoftMaskPPConfig,
    SpecialIds,
    SyCoCa,
    SyCoCaConfig,
    TextConfig,
    VisionConfig,
)
from softmask.models.softmask_pp.masking import Draws, mask_tokens, pick_words, word_positions

SPECIAL = SpecialIds(pad=0, cls=1, sep=2, mask=3)
VOCABULARY = 60
COCA = {"reconstruct": False, "caption_masking": "none"}
POOLED = {"pooler_queries": 5, "pooler_heads": 2}


def small_config(**options) -> SoftMaskPPConfig:
    text = {
        "vocab_size": VOCABULARY,
        "width": 32,
        "heads": 4,
        "intermediate_size": 64,
        "text_layers": 1,
        "fusion_layers": 3,
        "max_positions": 32,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    } | options.pop("text", {})
    defaults = {"embed_dim": 16, "queue_size": 24, "cam_layer": 1}
    return SoftMaskPPConfig(
        vision=VisionConfig(
            name="conv_vit",
            image_size=32,
            conv_vit=ConvViTConfig(patch_size=8, width=24, depth=1, heads=2, stem_width=4),
        ),
        text=TextConfig(**text),
        **(defaults | options),
    )


def small_model(*, spread: float = 4.0, seed: int = 0, **options) -> SoftMaskPP:
    """Weights `spread` times larger than at initialization, so that attention and logits are far from uniform, and
    a momentum encoder that differs from the student."""
    torch.manual_seed(seed)
    model = SoftMaskPP(small_config(**options), special_ids=SPECIAL)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("temperature") or "norm" in name:
                continue
            parameter.mul_(spread) if parameter.ndim > 1 else parameter.normal_(std=0.1)
        for parameter in model.momentum_encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def small_sycoca(
    *, vit: str = "conv_vit", width: int = 24, image_size: int = 32, pool: str = "cls", style: str = "own", **options
) -> SyCoCa:
    """Weights four times larger than at initialization, so that attention is far from uniform."""
    torch.manual_seed(0)
    text = CausalTextConfig(
        vocab_size=VOCABULARY, width=32, heads=4, layers=2, decoder_layers=2, max_positions=16, style=style
    )
    vision = VisionConfig(
        name=vit,
        image_size=image_size,
        pool=pool,
        conv_vit=ConvViTConfig(patch_size=8, width=width, depth=2, heads=2, stem_width=4),
    )
    defaults = {"embed_dim": 16, "image_decoder_layers": 1, "image_decoder_heads": 2}
    model = SyCoCa(SyCoCaConfig(vision=vision, text=text, **(defaults | options)), special_ids=SPECIAL)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "vision" not in name:
                parameter.mul_(4.0)
    return model.double()


def small_batch(size: int = 6, *, length: int = 11, seed: int = 1, dtype: torch.dtype = torch.float32) -> Batch:
    """Captions of 3 .. length - 2 words, every third word of two tokens."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(4, VOCABULARY, (size, length), generator=generator)
    real = torch.randint(5, length + 1, (size,), generator=generator)
    real[0] = length
    position = torch.arange(length).expand(size, -1)
    attention_mask = position < real[:, None]
    input_ids = torch.where(attention_mask, input_ids, SPECIAL.pad)
    input_ids[:, 0] = SPECIAL.cls
    input_ids.scatter_(1, real[:, None] - 1, SPECIAL.sep)
    inner = attention_mask & (position > 0) & (position < real[:, None] - 1)
    word = torch.tensor([0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10])[:length]
    return Batch(
        images=torch.randn(size, 3, 32, 32, generator=generator, dtype=dtype),
        input_ids=input_ids,
        attention_mask=attention_mask,
        word_ids=torch.where(inner, word.expand(size, -1), -1),
        image_id=torch.arange(size),
        skipped=[],
    )


def small_draws(batch: Batch, *, seed: int = 2) -> Draws:
    """Masked tokens, other pairs' captions and images, and one word of every caption, for SoftMask++."""
    torch.manual_seed(seed)
    masked = mask_tokens(batch.input_ids, SPECIAL, vocab_size=VOCABULARY, probability=0.15)
    size = len(batch.images)
    own = torch.arange(size)
    hard_text, hard_image = ((own + torch.randint(1, size, (size,))) % size for _ in range(2))
    word = pick_words(batch.word_ids, masked.input_ids == batch.input_ids)
    words = word_positions(batch.word_ids, word, max_tokens=8)
    return Draws(masked=masked, hard_text=hard_text, hard_image=hard_image, word_index=words)
