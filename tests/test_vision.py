"""The small image encoder: what a token of its stem sees."""

from __future__ import annotations

import pytest
import torch

from softmask.models.vision import ConvStem


def seen_pixels(stem: ConvStem, row: int, column: int, size: int) -> torch.Tensor:
    """[S, S] bool: the pixels that the token at (row, column) of the grid depends on."""
    image = torch.rand(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    token = stem(image)[0, row * stem.grid_size[1] + column]
    (grad,) = torch.autograd.grad(token.sum(), image)
    return grad[0].abs().sum(0) > 0


def always_active(stem: ConvStem) -> ConvStem:
    """Weights under which no ReLU and no cancellation hides a pixel."""
    for parameter in stem.parameters():
        torch.nn.init.uniform_(parameter, 0.1, 1.0)
    return stem.double().eval()


@pytest.mark.parametrize("patch_size", [2, 4, 8, 16])
def test_a_token_looks_at_its_own_patch(patch_size: int) -> None:
    """Its receptive field is a square around the middle of its patch: maps over tokens lie where the objects are."""
    size = 8 * patch_size
    options = {"img_size": size, "patch_size": patch_size, "in_chans": 3, "embed_dim": 8, "stem_width": 4}
    stem = always_active(ConvStem(**options))
    seen = seen_pixels(stem, 4, 3, size)
    rows, columns = (torch.nonzero(seen.any(dim=axis)).flatten() for axis in (1, 0))
    assert seen.sum() == len(rows) * len(columns)  # a rectangle without holes
    assert rows[0] + rows[-1] == (2 * 4 + 1) * patch_size - 1
    assert columns[0] + columns[-1] == (2 * 3 + 1) * patch_size - 1
    assert patch_size <= len(rows) == len(columns) < 5 * patch_size


def test_sizes_that_do_not_fit_are_refused() -> None:
    options = {"in_chans": 3, "embed_dim": 8, "stem_width": 4}
    with pytest.raises(ValueError, match="conv_vit.patch_size: expected a power of two from 2 on, got 6"):
        ConvStem(img_size=48, patch_size=6, **options)
    with pytest.raises(ValueError, match="vision.image_size: expected a multiple of conv_vit.patch_size 8, got 60"):
        ConvStem(img_size=60, patch_size=8, **options)
