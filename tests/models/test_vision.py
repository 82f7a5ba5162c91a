"""The image encoders: receptive fields, patch sizes, masked patches."""

from __future__ import annotations

import pytest
import torch

from softmask.models import ConvViTConfig, VisionConfig
from softmask.models.layers.vision import ConvStem, VisionEncoder


def seen_pixels(stem: ConvStem, row: int, column: int, size: int) -> torch.Tensor:
    """[S, S] bool: the pixels that the token at (row, column) of the grid depends on."""
    image = torch.rand(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    token = stem(image)[0, row * stem.grid_size[1] + column]
    (grad,) = torch.autograd.grad(token.sum(), image)
    return grad[0].abs().sum(0) > 0


def always_active(stem: ConvStem) -> ConvStem:
    """Set weights with which no ReLU and no cancellation hides a pixel."""
    for parameter in stem.parameters():
        torch.nn.init.uniform_(parameter, 0.1, 1.0)
    return stem.double().eval()


@pytest.mark.parametrize("patch_size", [2, 4, 8, 16])
def test_receptive_field_is_centred_on_the_patch(patch_size: int) -> None:
    """If not, maps over tokens would be shifted from the objects."""
    size = 8 * patch_size
    options = {"img_size": size, "patch_size": patch_size, "in_chans": 3, "embed_dim": 8, "stem_width": 4}
    stem = always_active(ConvStem(**options))
    seen = seen_pixels(stem, 4, 3, size)
    rows, columns = (torch.nonzero(seen.any(dim=axis)).flatten() for axis in (1, 0))
    assert seen.sum() == len(rows) * len(columns)  # a rectangle without holes
    assert rows[0] + rows[-1] == (2 * 4 + 1) * patch_size - 1
    assert columns[0] + columns[-1] == (2 * 3 + 1) * patch_size - 1
    assert patch_size <= len(rows) == len(columns) < 5 * patch_size


def test_bad_image_and_patch_sizes_are_refused() -> None:
    options = {"in_chans": 3, "embed_dim": 8, "stem_width": 4}
    with pytest.raises(ValueError, match="conv_vit.patch_size: expected a power of two from 2 on, got 6"):
        ConvStem(img_size=48, patch_size=6, **options)
    with pytest.raises(ValueError, match="vision.image_size: expected a multiple of conv_vit.patch_size 8, got 60"):
        ConvStem(img_size=60, patch_size=8, **options)
    message = "vision.image_size: expected a multiple of vit_tiny_patch16_224's patch size 16, got 72"
    with pytest.raises(ValueError, match=message):  # timm would leave out the last 8 pixels
        VisionEncoder(VisionConfig(name="vit_tiny_patch16_224", image_size=72))


def test_patch_size_overrides_that_of_the_model() -> None:
    """There is a token per patch of that size, embedded from its own pixels."""
    own = VisionEncoder(VisionConfig(name="vit_tiny_patch16_224", image_size=48))
    encoder = VisionEncoder(VisionConfig(name="vit_tiny_patch16_224", image_size=48, patch_size=12))
    images = torch.randn(2, 3, 48, 48)
    assert (own.patch_size, own.patch_grid, own(images).shape) == (16, (3, 3), (2, 10, 192))
    assert (encoder.patch_size, encoder.patch_grid, encoder(images).shape) == (12, (4, 4), (2, 17, 192))
    projection = encoder.vit.patch_embed.proj
    pixels = images[:, :, 12:24, 36:48].flatten(1)  # row 1, column 3 of the grid
    expected = torch.nn.functional.linear(pixels, projection.weight.flatten(1), projection.bias)
    torch.testing.assert_close(encoder.vit.patch_embed(images)[:, 7], expected)


def test_weights_of_another_patch_size_are_resized(tmp_path) -> None:
    own = VisionEncoder(VisionConfig(name="vit_tiny_patch16_224", image_size=48))
    torch.save(own.vit.state_dict(), tmp_path / "vit.pth")
    options = {"image_size": 48, "patch_size": 12, "checkpoint": str(tmp_path / "vit.pth")}
    encoder = VisionEncoder(VisionConfig(name="vit_tiny_patch16_224", **options))
    assert torch.equal(encoder.vit.blocks[0].attn.qkv.weight, own.vit.blocks[0].attn.qkv.weight)
    assert encoder.vit.patch_embed.proj.weight.shape == (192, 3, 12, 12)
    assert encoder.vit.pos_embed.shape == (1, 17, 192)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "conv_vit", "patch_size": 8},
            r"vision.patch_size: expected 0 \(conv_vit has vision.conv_vit.patch_size\), got 8",
        ),
        ({"patch_size": -1}, "vision.patch_size: expected at least 0, got -1"),
        ({"patch_size": 18}, "vision.image_size: expected a multiple of vision.patch_size 18, got 256"),
    ],
)
def test_bad_patch_size_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionConfig(**options)


@pytest.mark.parametrize("training", [False, True])
def test_masked_patches_are_not_seen_by_their_neighbours(training: bool) -> None:
    """Two maskings of every image at once; BatchNorm keeps the statistics of whole images."""
    torch.manual_seed(0)
    encoder = VisionEncoder(
        VisionConfig(name="conv_vit", image_size=32, pool="mean", conv_vit=ConvViTConfig(width=16, depth=1, heads=2))
    ).train(training)
    images, token = torch.randn(3, 3, 32, 32), torch.randn(16)
    masked = torch.rand(6, 16) < 0.5
    statistics = [buffer.clone() for buffer in encoder.buffers()]
    seen = encoder(images, masked=masked, mask_token=token)
    assert all(map(torch.equal, statistics, encoder.buffers()))
    assert encoder.vit.patch_embed.training == training
    assert all(module.training == training for module in encoder.modules())
    hidden = masked[:3].reshape(3, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    changed = torch.where(hidden, torch.randn_like(images), images)
    again = encoder(changed, masked=masked, mask_token=token)
    assert torch.equal(again[:3], seen[:3])  # the first masking hides all that changed
    assert not torch.equal(again[3:], seen[3:])
    apart = encoder(images, masked=masked[3:], mask_token=token)
    torch.testing.assert_close(apart, seen[3:])


def test_stem_of_a_hybrid_does_not_see_masked_patches() -> None:
    """Although its convolutions reach across patches and its norms over the whole image."""
    torch.manual_seed(0)
    encoder = VisionEncoder(VisionConfig(name="vit_tiny_r_s16_p8_224", image_size=64))
    images, token, masked = torch.randn(1, 3, 64, 64), torch.randn(192), torch.tensor([[True, False, False, True]])
    changed = images.clone()
    changed[:, :, :32, :32] = 0.3
    changed[:, :, 32:, 32:] = -0.7
    assert encoder.patch_grid == (2, 2)
    seen, again = (encoder(some, masked=masked, mask_token=token) for some in (images, changed))
    assert torch.equal(seen, again)
    changed[:, :, :32, 32:] = 0.3
    assert not torch.equal(encoder(changed, masked=masked, mask_token=token), seen)
