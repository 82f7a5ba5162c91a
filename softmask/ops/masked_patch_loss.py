"""MAE's reconstruction loss on masked patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from softmask import reference
from softmask.ops import _checks
from softmask.ops._backend import run
from softmask.ops._fused import masked_patch_loss as fused
from softmask.ops._transforms import constant


def masked_patch_loss(
    prediction: Tensor,
    images: Tensor,
    mask: Tensor,
    *,
    patch_size: int,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Mean squared error on the pixels of masked patches, mean over masked patches.

    Args:
        prediction: [B, P, 3 * patch_size**2], pixels of a patch ordered rows, columns, channels; fp32, fp16, bf16 or
            fp64.
        images: [B, 3, Hpx, Wpx], any strides; the targets, without gradient.
            P = (Hpx / patch_size) * (Wpx / patch_size), patches row by row.
        mask: [B, P] bool, True = masked, to be reconstructed.
        patch_size: pixels; must divide Hpx and Wpx.
        normalize: use ``(x - mean) / sqrt(var + 1e-6)`` of each patch's pixels as targets, var unbiased.
        reduction: "mean" or "sum" over masked patches, or "none" for [B, P], 0 where not masked.

    Returns:
        The loss, fp32 (fp64 for fp64 inputs), differentiable in prediction. 0 if no patch is masked.

    Raises:
        ValueError: an argument is invalid; the message states what was expected and what was given.

    Source: MAE (arXiv 2111.06377), its public code; as in SyCoCa's TG-MIM (arXiv 2401.02137).
    """
    _checks.shape("images", images, ("B", 3, "Hpx", "Wpx"))
    _checks.whole("patch_size", patch_size, least=1)
    batch, _, height, width = images.shape
    if height % patch_size or width % patch_size:
        _checks.fail("images", f"height and width divisible by patch_size {patch_size}", f"{height} x {width}")
    patches = (height // patch_size) * (width // patch_size)
    _checks.shape("prediction", prediction, (batch, patches, 3 * patch_size**2))
    _checks.shape("mask", mask, (batch, patches))
    _checks.dtype("prediction", prediction)
    _checks.dtype("images", images)
    _checks.dtype("mask", mask, (torch.bool,))
    _checks.device(prediction, images=images, mask=mask)
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    return run(
        "masked_patch_loss",
        reference.masked_patch_loss,
        fused.masked_patch_loss,
        prediction,
        constant(images),
        mask,
        floating=(prediction, images),
        patch_size=patch_size,
        normalize=normalize,
        reduction=reduction,
    )


class MaskedPatchLoss(nn.Module):
    """:func:`masked_patch_loss` as a layer without parameters."""

    def __init__(self, *, patch_size: int, normalize: bool = True, reduction: str = "mean") -> None:
        super().__init__()
        self.patch_size, self.normalize, self.reduction = patch_size, normalize, reduction

    def forward(self, prediction: Tensor, images: Tensor, mask: Tensor) -> Tensor:
        return masked_patch_loss(
            prediction,
            images,
            mask,
            patch_size=self.patch_size,
            normalize=self.normalize,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}, normalize={self.normalize}, reduction={self.reduction!r}"
