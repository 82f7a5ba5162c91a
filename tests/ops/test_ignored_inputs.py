"""No backend reads ignored inputs: NaN there changes no bit of the result, and its gradient is 0."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import softmask
from softmask import ops
from tests.support import kernel_cases as cases
from tests.support.kernel_cases import Case, needs_cpp, outcome

pytestmark = pytest.mark.usefixtures("poisoned_memory", "fast_interpreter")
BACKENDS = ["reference", pytest.param("cpp", marks=needs_cpp), pytest.param("triton", marks=cases.needs_triton)]
for_each_backend = pytest.mark.parametrize("backend", BACKENDS)
JUNK = [float("nan"), float("inf"), float("-inf")]
CASES = {
    "word_attention": cases.word_attention(63, masked=True),
    "word_attention minmax": cases.word_attention(63, masked=True, normalize="minmax"),
    "word_attention without Grad-CAM": cases.word_attention(63, masked=True, gradcam=False),
    "soft_mask_attention": cases.soft_mask_attention(63, masked=True),
    "soft_mask_attention without weights": cases.soft_mask_attention(63, masked=True, weighted=False),
    "soft_mask_attention without kv_index": cases.soft_mask_attention(63, masked=True, shared=False),
    "masked_patch_loss": cases.masked_patch_loss(4),
    "masked_patch_loss without normalization": cases.masked_patch_loss(4, normalize=False),
}


def unread(case: Case) -> dict[str, Tensor]:
    """Where each tensor is ignored."""
    if "mask" in case.fixed:
        seen = ~case.fixed["mask"]  # [2, 15] patches of 4 pixels a side
        pixels = seen.reshape(2, 1, 3, 1, 5, 1).expand(2, 3, 3, 4, 5, 4).reshape(2, 3, 12, 20)
        return {"prediction": seen[..., None], "images": pixels}
    ignored = case.fixed["key_padding_mask"]  # [B, P]
    if "word_index" in case.fixed:
        named = torch.zeros(case.leaves["query"].shape[::2][:2], dtype=torch.bool)  # [B, T]
        for row, index in zip(named, case.fixed["word_index"].flatten(1), strict=True):
            row[index[index >= 0]] = True
        of_value = ignored.clone()
        of_value[:, 0] = True  # the prefix token's column is dropped
        rows = dict.fromkeys(("query", "grad_output"), ~named[:, None, :, None])
        found = {"key": ignored[:, None, :, None], "value": of_value[:, None, :, None], **rows}
    else:
        index = case.fixed.get("kv_index", torch.arange(len(ignored)))
        unused = ignored | (torch.bincount(index, minlength=len(ignored)) == 0)[:, None]
        found = dict.fromkeys(("key", "value"), unused[:, None, :, None]) | {"key_weight": ignored[index]}
    return {name: where for name, where in found.items() if name in case.leaves | case.fixed}


def filled(case: Case, value: float) -> Case:
    where = unread(case)
    leaves, fixed = (
        {name: one.masked_fill(where[name], value) if name in where else one for name, one in group.items()}
        for group in (case.leaves, case.fixed)
    )
    return replace(case, leaves=leaves, fixed=fixed)


@for_each_backend
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ignored_inputs_are_not_read(name: str, dtype: torch.dtype, backend: str) -> None:
    case = CASES[name].cast(dtype)
    expected = outcome(backend, filled(case, 0.0))
    for value in JUNK if dtype == torch.float32 else JUNK[:1]:
        got = outcome(backend, filled(case, value))
        for key, one in expected.items():
            assert one.isfinite().all() and torch.equal(got[key], one), (key, value)
        for key, where in unread(case).items():
            assert key not in got or not got[key].masked_select(where).any(), (key, value)


@for_each_backend
def test_padded_tokens_do_not_change_the_attentive_mask(backend: str) -> None:
    patches, tokens = cases.normal(3, 63, 33, seed=0).float(), cases.normal(3, 9, 33, seed=1).float()
    padding = cases.normal(3, 9, seed=2) < 0.3
    padding[2] = True

    def selected(value: float) -> Tensor:
        with softmask.backend(backend):
            given = tokens.masked_fill(padding[..., None], value)
            return ops.attentive_mask(patches, given, ratio=0.5, token_padding_mask=padding)

    assert all(torch.equal(selected(value), selected(0.0)) for value in JUNK)
