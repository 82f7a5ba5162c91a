"""The Triton kernels of all ops: errors against fp64 truth, by Triton's interpreter where there is no GPU."""

from __future__ import annotations

import kernel_cases as cases
import pytest
import torch
from kernel_cases import SIZES, check_errors

pytestmark = [cases.needs_triton, pytest.mark.usefixtures("poisoned_memory", "fast_interpreter")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMALIZATIONS = ["minmax", "max", "sum", None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_soft_mask(size: int, dtype: torch.dtype) -> None:
    # The gradient through "max" and "sum" of a single patch is 1e-7 of its terms: nothing but rounding.
    chosen = NORMALIZATIONS if size > 1 else ["minmax", None]
    check_errors("triton", dtype, *(cases.soft_mask(size, normalize=normalize) for normalize in chosen))
    check_errors("triton", dtype, cases.soft_mask(size, words=3, prefix=0))
