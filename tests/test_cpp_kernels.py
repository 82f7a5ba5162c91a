"""The C++ kernels of all ops: errors against fp64 truth, bits for any number of threads, what is registered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import kernel_cases as cases
import pytest
import torch
from kernel_cases import GAMMAS, SIZES, check_errors, needs_cpp, outcome

import softmask
from softmask import ops

pytestmark = [needs_cpp, pytest.mark.usefixtures("poisoned_memory")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMALIZATIONS = ["minmax", "max", "sum", None]


FLAGS = (True, False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_word_attention(size: int, dtype: torch.dtype) -> None:
    options = [{"gradcam": gradcam, "masked": masked} for gradcam in FLAGS for masked in FLAGS]
    options += [{"normalize": normalize} for normalize in NORMALIZATIONS]
    check_errors("cpp", dtype, *(cases.word_attention(size, **chosen) for chosen in options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_contrastive(size: int, dtype: torch.dtype) -> None:
    options = [{"gamma": gamma, "with_ids": with_ids} for gamma in GAMMAS for with_ids in FLAGS]
    check_errors("cpp", dtype, *(cases.contrastive(size, **chosen) for chosen in options))
    check_errors("cpp", dtype, *(cases.contrastive(size, gamma=gamma, scale=100.0) for gamma in GAMMAS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queue", [0, 7, 130, 577])
def test_momentum_contrastive(queue: int, dtype: torch.dtype) -> None:
    options = [{"gamma": gamma, "with_ids": with_ids} for gamma in GAMMAS for with_ids in FLAGS]
    options.append({"transposed": True})
    extreme = [{"gamma": gamma, "alpha": alpha, "scale": 100.0} for gamma in GAMMAS for alpha in (0.0, 0.5, 1.0)]
    for group in (options, extreme):
        check_errors(
            "cpp",
            dtype,
            *(cases.momentum_contrastive(size, queue=queue, **chosen) for chosen in group for size in (1, 7, 63)),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_soft_mask_attention(size: int, dtype: torch.dtype) -> None:
    options = [{"shared": s, "weighted": w, "masked": m} for s in FLAGS for w in FLAGS for m in FLAGS]
    check_errors("cpp", dtype, *(cases.soft_mask_attention(size, **chosen) for chosen in options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("patch_size", [1, 4, 7, 16])
def test_masked_patch_loss(patch_size: int, dtype: torch.dtype) -> None:
    options = [{"normalize": normalize, "share": share} for normalize in FLAGS for share in (0.0, 0.5, 1.0)]
    check_errors("cpp", dtype, *(cases.masked_patch_loss(patch_size, **chosen) for chosen in options))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("select", ["high", "low"])
def test_attentive_mask(select: str, dtype: torch.dtype) -> None:
    """The same patches as in PyTorch, where no two are within a rounding of each other."""
    for size in SIZES:
        patches, tokens = (cases.normal(3, n, 33, seed=n).to(dtype) for n in (size, 9))
        padding = cases.normal(3, 9, seed=1) < 0
        padding[2] = True
        for ratio in (0.0, 0.3, 0.5, 1.0):
            marked = []
            for backend in ("reference", "cpp"):
                with softmask.backend(backend):
                    options = {"ratio": ratio, "select": select, "token_padding_mask": padding}
                    marked.append(ops.attentive_mask(patches, tokens, **options))
            assert torch.equal(*marked)


@pytest.mark.parametrize("name", cases.ALL)
def test_bits_repeat(name: str) -> None:
    """On every run, and with any number of threads but for the contrastive losses, whose products the BLAS splits."""
    case = cases.ALL[name].cast(torch.float32)
    counts = (1, 2, 3) if "contrastive" not in name else (torch.get_num_threads(),)
    threads = torch.get_num_threads()
    try:
        outcomes = []
        for count in counts:
            torch.set_num_threads(count)
            outcomes += [outcome("cpp", case), outcome("cpp", case)]
    finally:
        torch.set_num_threads(threads)
    for other in outcomes[1:]:
        for key, value in outcomes[0].items():
            assert torch.equal(other[key], value), key


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_instruction_sets(capability: str) -> None:
    """What this processor would not choose: the same errors against fp64, in a process that is told to."""
    selection = "test_word_attention or test_contrastive or test_soft_mask_attention or test_masked or test_attentive"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    command += ["-k", f"({selection} or test_momentum) and (130 or patch or attentive) and not opcheck and not bits"]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
