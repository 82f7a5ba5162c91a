"""Image encoders: any timm ViT, or a small one with a convolutional stem."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from softmask.models.config import CONV_VIT, VisionConfig
from softmask.models.layers.numerics import at_least_fp32
from softmask.models.layers.vision_weights import load_vit
from softmask.ranges import named_range

LAYER_SCALE = 0.1  # at first the blocks change the convolutions' output a little


class GlobalBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d with the statistics of the batch over all ranks, gradient included, so that two ranks of B/2 give
    what one rank of B gives. On one rank it is BatchNorm2d; nn.SyncBatchNorm does the same on GPUs only.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        wide = at_least_fp32(x)
        count = wide.numel() / wide.shape[1] * dist.get_world_size()  # ranks have equal batches
        mean = all_reduce(wide.sum((0, 2, 3))) / count
        centered = wide - mean[:, None, None]
        variance = all_reduce(centered.square().sum((0, 2, 3))) / count
        self._track(mean.detach(), variance.detach() * count / (count - 1))
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None  # all are None only on request
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)


@contextmanager
def running_statistics(part: nn.Module) -> Iterator[None]:
    """BatchNorm uses its running statistics and leaves them unchanged: for images unlike those of training."""
    norms = [module for module in part.modules() if isinstance(module, GlobalBatchNorm) and module.training]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


def _halve(width: int, out: int, *, kernel_size: int) -> nn.Sequential:
    # Even kernels: an odd one would put every token half a stride up and left of the pixels it stands for.
    convolution = nn.Conv2d(width, out, kernel_size, stride=2, padding=kernel_size // 2 - 1, bias=False)
    return nn.Sequential(convolution, GlobalBatchNorm(out), nn.ReLU(inplace=True))


class ResidualBlock(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))), [B, C, H, W], as in ResNet."""

    def __init__(self, width: int, *, kernel_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2, bias=False),
            GlobalBatchNorm(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2, bias=False),
            GlobalBatchNorm(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.layers(x))


class ConvStem(nn.Module):
    """Convolutions in place of a patch projection ("Early Convolutions Help Transformers See Better", 2106.14881).

    images [B, 3, S, S] -> tokens [B, (S / patch_size)**2, embed_dim]. Every level halves the image and doubles the
    width; the last two have a residual block. The last level sees its own patch alone, which limits a token's receptive
    field: at the demo's size to 30 pixels of 64, instead of 63 with 3 x 3 kernels everywhere. BatchNorm because
    GroupNorm learned far slower (docs/demo.md).
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
            last = level == halvings - 1
            layers.append(_halve(width, out, kernel_size=2 if last else 4))
            if level >= halvings - 2:
                layers.append(ResidualBlock(out, kernel_size=1 if last else 3))
            width = out
        layers.append(nn.Conv2d(width, embed_dim, 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        # Channels last takes two thirds of the time on a CPU, and gives the tokens in their order without a copy.
        return self.layers(images.contiguous(memory_format=torch.channels_last)).flatten(2).transpose(1, 2)


def _conv_vit(config: VisionConfig) -> VisionTransformer:
    own = config.conv_vit
    return VisionTransformer(
        img_size=config.image_size,
        global_pool="avg" if config.pool == "mean" else "token",  # "avg" normalizes after pooling
        patch_size=own.patch_size,
        embed_dim=own.width,
        depth=own.depth,
        num_heads=own.heads,
        mlp_ratio=own.mlp_ratio,
        init_values=LAYER_SCALE,
        drop_path_rate=config.drop_path,
        num_classes=0,
        weight_init="jax",  # Xavier: std 0.02 is too small for these widths
        embed_layer=partial(ConvStem, stem_width=own.stem_width),
    )


def _vit(config: VisionConfig) -> Any:
    if config.name == CONV_VIT:
        return _conv_vit(config)
    options: dict[str, Any] = {"img_size": config.image_size, "drop_path_rate": config.drop_path, "num_classes": 0}
    if config.patch_size:
        options["patch_size"] = config.patch_size
    return timm.create_model(config.name, **options)


class VisionEncoder(nn.Module):
    """images [B, 3, S, S] -> tokens [B, P, D]: prefix tokens, CLS first, then the patches."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.vit = _vit(config)
        self.weights_from = load_vit(self.vit, config.checkpoint) if config.checkpoint else "random"
        self.pooling = config.pool
        self.num_prefix_tokens: int = getattr(self.vit, "num_prefix_tokens", 0)
        if config.pool == "cls" and self.num_prefix_tokens < 1:
            raise ValueError(f"vision.name: expected a timm ViT with a class token (pool: cls), got {config.name!r}")
        self.width: int = self.vit.embed_dim
        self.patch_grid: tuple[int, int] = tuple(self.vit.patch_embed.grid_size)
        self.patch_size = self._patch_size(config)
        # Whether a token sees pixels beyond its patch: conv_vit and timm's hybrids.
        self.stem_sees_across = not isinstance(self.vit.patch_embed, PatchEmbed)

    def _patch_size(self, config: VisionConfig) -> int:
        """ValueError where the patches do not cover the image: timm drops the rest."""
        size = config.conv_vit.patch_size if config.name == CONV_VIT else self.vit.patch_embed.feat_ratio()
        if (size * self.patch_grid[0], size * self.patch_grid[1]) != (config.image_size, config.image_size):
            expected = f"a multiple of {config.name}'s patch size {size}"
            raise ValueError(f"vision.image_size: expected {expected}, got {config.image_size}")
        return size

    def set_activation_checkpointing(self, enable: bool) -> None:
        self.vit.set_grad_checkpointing(enable)

    @named_range("image encoder")
    def forward(self, images: Tensor, *, masked: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """With `masked` [R * B, patches] bool, `mask_token` [D] replaces those patches before the first block; R masks
        for each of the B images, one after another, give tokens [R * B, P, D]."""
        if masked is None or mask_token is None:
            return self.vit.forward_features(images)
        maskings = len(masked) // len(images)
        if self.stem_sees_across:
            images, maskings = self._blank(images.repeat(maskings, 1, 1, 1), masked), 1

        def replace(_module: nn.Module, _inputs: tuple, patches: Tensor) -> Tensor:
            return torch.where(masked[..., None], mask_token.to(patches.dtype), patches.repeat(maskings, 1, 1))

        hook = self.vit.patch_embed.register_forward_hook(replace)
        try:
            with running_statistics(self.vit.patch_embed):
                return self.vit.forward_features(images)
        finally:
            hook.remove()

    def _blank(self, images: Tensor, masked: Tensor) -> Tensor:
        """images [B, 3, S, S] with zeros, the mean colour, in the masked patches [B, patches]: no neighbour sees them.

        BatchNorm's statistics of such images differ from those of whole images, which evaluation sees.
        """
        plane = masked.unflatten(1, self.patch_grid)[:, None]
        for dim in (2, 3):
            plane = plane.repeat_interleave(self.patch_size, dim)
        return images.masked_fill(plane, 0.0)

    def tokens(self, images: Tensor) -> Tensor:
        """Tokens [B, P, D] of images [B, 3, S, S]; tokens are returned as they are."""
        return images if images.ndim == 3 else self(images)

    def pool(self, tokens: Tensor) -> Tensor:
        """tokens [B, P, D] -> [B, D]: CLS, or the mean over the patches."""
        if self.pooling == "cls":
            return tokens[:, 0]
        return self.vit.fc_norm(tokens[:, self.num_prefix_tokens :].mean(dim=1))

    def pool_each(self, patches: Tensor) -> Tensor:
        """patches [B, P, D] -> [B, P, D], each pooled by itself."""
        return patches if self.pooling == "cls" else self.vit.fc_norm(patches)
