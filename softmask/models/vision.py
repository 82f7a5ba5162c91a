"""Image encoders: any timm ViT with a class token, or a small one with a convolutional stem."""

from __future__ import annotations

from functools import partial

import timm
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .config import ConvViTConfig, VisionConfig

CONV_VIT = "conv_vit"


class ResidualConv(nn.Module):
    """x + gelu(norm(conv3x3(x))), [B, C, H, W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(1, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.norm(self.conv(x)))


class ConvStem(nn.Module):
    """Strided 3x3 convolutions in place of a patch projection ("Early Convolutions Help Transformers See Better"),
    the last two levels each followed by a residual one.

    images [B, 3, S, S] -> tokens [B, (S / patch_size)**2, embed_dim]. GroupNorm, unlike BatchNorm, gives the same
    result on one rank and on many.
    """

    def __init__(self, *, img_size: int, patch_size: int, in_chans: int, embed_dim: int, stem_width: int, **_: object):
        super().__init__()
        halvings = patch_size.bit_length() - 1
        if patch_size != 2**halvings or halvings < 1:
            raise ValueError(f"conv_vit.patch_size: expected a power of two from 2 on, got {patch_size}")
        if img_size % patch_size:
            raise ValueError(
                f"vision.image_size: expected a multiple of conv_vit.patch_size {patch_size}, got {img_size}"
            )
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        layers: list[nn.Module] = []
        width = in_chans
        for level in range(halvings):
            out = stem_width * 2**level
            layers += [nn.Conv2d(width, out, 3, stride=2, padding=1, bias=False), nn.GroupNorm(1, out), nn.GELU()]
            if level >= halvings - 2:
                layers.append(ResidualConv(out))
            width = out
        layers.append(nn.Conv2d(width, embed_dim, 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten(2).transpose(1, 2)


def _conv_vit(config: ConvViTConfig, *, image_size: int, drop_path: float) -> VisionTransformer:
    return VisionTransformer(
        img_size=image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        drop_path_rate=drop_path,
        num_classes=0,
        weight_init="jax",  # Xavier: std 0.02 is too small for these widths
        embed_layer=partial(ConvStem, stem_width=config.stem_width),
    )


def _timm_vit(config: VisionConfig) -> nn.Module:
    options = {"img_size": config.image_size, "drop_path_rate": config.drop_path, "num_classes": 0}
    if config.checkpoint:
        # timm's own path for weights from a file: drops the head and resizes the position embeddings
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": config.checkpoint}}
    return timm.create_model(config.name, **options)


class VisionEncoder(nn.Module):
    """images [B, 3, S, S] -> tokens [B, P, D], normalized, prefix tokens (CLS first) in front of the patches."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        if config.name == CONV_VIT:
            self.vit = _conv_vit(config.conv_vit, image_size=config.image_size, drop_path=config.drop_path)
        else:
            self.vit = _timm_vit(config)
        if getattr(self.vit, "num_prefix_tokens", 0) < 1:
            raise ValueError(f"vision.name: expected a timm ViT with a class token, got {config.name!r}")
        self.width: int = self.vit.embed_dim
        self.num_prefix_tokens: int = self.vit.num_prefix_tokens
        self.patch_grid: tuple[int, int] = tuple(self.vit.patch_embed.grid_size)

    def set_activation_checkpointing(self, enable: bool) -> None:
        self.vit.set_grad_checkpointing(enable)

    def forward(self, images: Tensor) -> Tensor:
        return self.vit.forward_features(images)
