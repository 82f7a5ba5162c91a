"""What a mask leaves out is not read by Triton kernels: NaN there changes nothing, and its gradient is 0."""

from __future__ import annotations

from dataclasses import replace

import kernel_cases as cases
import pytest
import torch
from kernel_cases import Case, outcome
from torch import Tensor

import softmask
from softmask import ops

pytestmark = [cases.needs_triton, pytest.mark.usefixtures("poisoned_memory", "fast_interpreter")]
FLAGS = (True, False)
UNREAD = [float("nan"), float("inf")]


def check_not_read(case: Case, unread: dict[str, Tensor], value: float, dtype: torch.dtype) -> None:
    """Value in the elements of leaves that `unread` marks gives the bits that zeros do there."""
    case = case.cast(dtype)

    def filled(with_value: float) -> dict[str, Tensor]:
        chosen = {
            name: leaf.masked_fill(unread[name], with_value) for name, leaf in case.leaves.items() if name in unread
        }
        return outcome("triton", replace(case, leaves=case.leaves | chosen))

    got, expected = filled(value), filled(0.0)
    for name, one in expected.items():
        assert one.isfinite().all() and torch.equal(got[name], one), name
        if name in unread:
            assert (one.masked_select(unread[name]) == 0).all(), name


@pytest.mark.parametrize("value", UNREAD)
@pytest.mark.parametrize("gradcam", FLAGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ignored_keys_of_word_attention(gradcam: bool, value: float, dtype: torch.dtype) -> None:
    case = cases.word_attention(63, gradcam=gradcam, masked=True, normalize="minmax" if gradcam else None)
    ignored = case.fixed["key_padding_mask"][:, None, :, None]
    check_not_read(case, {"key": ignored} | ({"value": ignored} if gradcam else {}), value, dtype)


@pytest.mark.parametrize("value", UNREAD)
@pytest.mark.parametrize("shared", FLAGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ignored_keys_of_soft_mask_attention(shared: bool, value: float, dtype: torch.dtype) -> None:
    case = cases.soft_mask_attention(63, shared=shared, masked=True)
    ignored = case.fixed["key_padding_mask"]
    index = case.fixed["kv_index"] if shared else torch.arange(4)
    weight = case.fixed["key_weight"].masked_fill(ignored[index], value)
    zeros = replace(
        case, fixed=case.fixed | {"key_weight": weight.nan_to_num(0.0, 0.0).masked_fill(ignored[index], 0.0)}
    )
    got, expected = (
        outcome("triton", one.cast(dtype)) for one in (replace(case, fixed=case.fixed | {"key_weight": weight}), zeros)
    )
    assert all(torch.equal(got[name], expected[name]) and got[name].isfinite().all() for name in expected)
    check_not_read(case, dict.fromkeys(("key", "value"), ignored[:, None, :, None]), value, dtype)


def test_images_that_no_pair_uses() -> None:
    case = cases.soft_mask_attention(63)
    unused = (torch.arange(4) == 1)[:, None, None, None]
    check_not_read(case, dict.fromkeys(("key", "value"), unused), float("nan"), torch.float32)


@pytest.mark.parametrize("normalize", FLAGS)
def test_patches_that_are_not_masked(normalize: bool) -> None:
    case = cases.masked_patch_loss(4, normalize=normalize)
    seen = ~case.fixed["mask"]  # [2, 15]
    pixels = seen.reshape(2, 1, 3, 1, 5, 1).expand(2, 3, 3, 4, 5, 4).reshape(2, 3, 12, 20)
    check_not_read(case, {"prediction": seen[..., None], "images": pixels}, float("nan"), torch.float32)


def test_ignored_tokens_of_attentive_mask() -> None:
    patches, tokens = cases.normal(3, 63, 33, seed=0).float(), cases.normal(3, 9, 33, seed=1).float()
    padding = cases.normal(3, 9, seed=2) < 0.3

    def selected(value: float) -> Tensor:
        with softmask.backend("triton"):
            given = tokens.masked_fill(padding[..., None], value)
            return ops.attentive_mask(patches, given, ratio=0.5, token_padding_mask=padding)

    assert all(torch.equal(selected(value), selected(0.0)) for value in UNREAD)
