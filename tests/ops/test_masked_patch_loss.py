"""masked_patch_loss against MAE's patchify and loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from softmask import ops

pytestmark = pytest.mark.usefixtures("each_backend")


def make(rows: int = 2, columns: int = 3, patch: int = 4, *, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, rows * patch, columns * patch, generator=generator, dtype=torch.float64)
    prediction = torch.randn(batch, rows * columns, 3 * patch**2, generator=generator, dtype=torch.float64)
    mask = torch.rand(batch, rows * columns, generator=generator) < 0.6
    return prediction, images, mask


def mae(prediction: Tensor, images: Tensor, mask: Tensor, patch: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """patchify and forward_loss as in MAE's code, for images that need not be square: mean, and per patch."""
    batch, _, height, width = images.shape
    h, w = height // patch, width // patch
    target = images.reshape(batch, 3, h, patch, w, patch)
    target = torch.einsum("nchpwq->nhwpqc", target).reshape(batch, h * w, patch**2 * 3)
    if normalize:
        mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        target = (target - mean) / (var + 1.0e-6) ** 0.5
    loss = ((prediction - target) ** 2).mean(dim=-1)
    return (loss * mask).sum() / mask.sum(), loss * mask


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("rows", "columns", "patch"), [(1, 1, 1), (2, 3, 4), (7, 9, 2), (1, 130, 1), (3, 2, 16)])
def test_equals_mae(normalize: bool, rows: int, columns: int, patch: int) -> None:
    prediction, images, mask = make(rows, columns, patch)
    mask[0, 0] = True
    prediction.requires_grad_()
    mean, each = mae(prediction, images, mask, patch, normalize)
    for reduction, expected in {"mean": mean, "sum": each.sum(), "none": each}.items():
        loss = ops.masked_patch_loss(
            prediction, images, mask, patch_size=patch, normalize=normalize, reduction=reduction
        )
        torch.testing.assert_close(loss, expected)
        got, want = (torch.autograd.grad(value.sum(), prediction, retain_graph=True)[0] for value in (loss, expected))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(reduction: str, normalize: bool) -> None:
    prediction, images, mask = make(2, 2, 2)
    assert torch.autograd.gradcheck(
        lambda p: ops.masked_patch_loss(p, images, mask, patch_size=2, normalize=normalize, reduction=reduction),
        prediction.requires_grad_(),
    )


def test_no_masked_patches_and_empty_batch() -> None:
    prediction, images, mask = make()
    prediction.requires_grad_()
    loss = ops.masked_patch_loss(prediction, images, torch.zeros_like(mask), patch_size=4)
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert loss.item() == 0.0 and torch.equal(gradient, torch.zeros_like(prediction))
    assert ops.masked_patch_loss(prediction[:0], images[:0], mask[:0], patch_size=4).item() == 0.0


def test_only_masked_predictions_get_gradients() -> None:
    """Images and unmasked patches get none; constant patches (variance 0) stay finite."""
    prediction, images, mask = make()
    images[0] = 0.5
    prediction.requires_grad_()
    images.requires_grad_()
    ops.masked_patch_loss(prediction, images, mask, patch_size=4).backward()
    assert images.grad is None and prediction.grad.isfinite().all()
    assert not prediction.grad[~mask].any() and prediction.grad[mask].any(-1).all()


def test_strided_inputs() -> None:
    prediction, images, mask = make(3, 3)
    expected = ops.masked_patch_loss(prediction, images, mask, patch_size=4)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    cropped = torch.cat([images, images], -1)[..., :12]
    for view in (channels_last, cropped, images.mT.contiguous().mT):
        assert not view.is_contiguous()
        torch.testing.assert_close(ops.masked_patch_loss(prediction, view, mask, patch_size=4), expected)
    strided = prediction.mT.contiguous().mT
    torch.testing.assert_close(ops.masked_patch_loss(strided, images, mask, patch_size=4), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_accumulates_in_fp32(dtype: torch.dtype) -> None:
    prediction, images, mask = make()
    prediction, images = prediction.to(dtype), images.to(dtype)
    expected = ops.masked_patch_loss(prediction.float(), images.float(), mask, patch_size=4)
    assert expected.dtype == torch.float32
    assert torch.equal(ops.masked_patch_loss(prediction, images, mask, patch_size=4), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.masked_patch_loss(prediction, images, mask, patch_size=4), expected)


def test_compile_and_module() -> None:
    prediction, images, mask = make()
    prediction.requires_grad_()
    module = ops.MaskedPatchLoss(patch_size=4, normalize=False, reduction="sum")
    losses = [
        torch.compile(module, fullgraph=True, backend="aot_eager")(prediction, images, mask),
        ops.masked_patch_loss(prediction, images, mask, patch_size=4, normalize=False, reduction="sum"),
    ]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, prediction)[0] for loss in losses))


def test_errors_name_the_bad_argument() -> None:
    prediction, images, mask = make()
    base = {"prediction": prediction, "images": images, "mask": mask, "patch_size": 4}
    for message, change in {
        r"images: expected shape \[B, 3, Hpx, Wpx\], got \[2, 1, 8, 12\]": {"images": images[:, :1]},
        r"images: expected height and width divisible by patch_size 5, got 8 x 12": {"patch_size": 5},
        r"patch_size: expected at least 1, got 0": {"patch_size": 0},
        r"prediction: expected shape \[2, 6, 48\], got \[2, 5, 48\]": {"prediction": prediction[:, 1:]},
        r"mask: expected shape \[2, 6\], got \[2, 5\]": {"mask": mask[:, 1:]},
        r"mask: expected bool, got torch.float32": {"mask": mask.float()},
        r"images: expected float32 or .*, got torch.uint8": {"images": images.byte()},
        r"images: expected device cpu, got meta": {"images": images.to("meta")},
        r"reduction: expected one of": {"reduction": "max"},
    }.items():
        with pytest.raises(ValueError, match=message):
            ops.masked_patch_loss(**{**base, **change})
