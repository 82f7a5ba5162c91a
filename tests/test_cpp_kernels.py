"""The C++ kernels of all ops: errors against fp64 truth, bits for any number of threads, what is registered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import kernel_cases as cases
import pytest
import torch
from kernel_cases import GAMMAS, SIZES, Case, check_errors, needs_cpp, outcome
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

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


ALL = {
    "word_attention": cases.word_attention(257, normalize="minmax"),
    "contrastive": cases.contrastive(257, gamma=2.0, with_ids=True),
    "momentum_contrastive": cases.momentum_contrastive(63, queue=577, gamma=0.5, with_ids=True),
    "soft_mask_attention": cases.soft_mask_attention(257, tokens=70),
    "masked_patch_loss": cases.masked_patch_loss(16),
}


@pytest.mark.parametrize("name", ALL)
def test_bits_repeat(name: str) -> None:
    """On every run, and with any number of threads but for the contrastive losses, whose products the BLAS splits."""
    case = ALL[name].cast(torch.float32)
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


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_changes_nothing(name: str, dtype: torch.dtype) -> None:
    case = ALL[name].cast(dtype)
    plain = outcome("cpp", case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = outcome("cpp", case)
    for key, value in plain.items():
        assert torch.equal(under[key], value), key


@pytest.mark.parametrize("name", ALL)
def test_no_silent_second_derivative(name: str) -> None:
    case = ALL[name].cast(torch.float32)
    first = next(iter(case.leaves))
    leaves = {key: leaf.detach().requires_grad_(key not in case.constants) for key, leaf in case.leaves.items()}
    with softmask.backend("cpp"):
        out = case.call(**leaves)
    (gradient,) = torch.autograd.grad(out.square().sum(), leaves[first], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_whole(name: str, compiler: str) -> None:
    torch.compiler.reset()
    case = ALL[name].cast(torch.float32)
    compiled = Case(case.leaves, torch.compile(case.call, fullgraph=True, backend=compiler), case.constants)
    plain, got = outcome("cpp", case), outcome("cpp", compiled)
    for key, value in plain.items():
        torch.testing.assert_close(got[key], value)


@pytest.mark.parametrize("name", [*ALL, "attentive_mask"])
def test_opcheck(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every registered op that a case reaches: its schema, its fake and its autograd, at the case's strides."""
    seen: list[tuple] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "softmask":
                seen.append((func, tree_map_only(Tensor, Tensor.detach, args)))
            return func(*args, **(kwargs or {}))

    with Record():
        if name == "attentive_mask":
            ops.attentive_mask(cases.normal(2, 7, 5, seed=0), cases.normal(2, 3, 5, seed=1), ratio=0.5)
        else:
            outcome("cpp", ALL[name].cast(torch.float32))
    assert len({func for func, _ in seen}) == (1 if name == "attentive_mask" else 2)
    for func, args in seen:
        floating = [arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()]
        for arg in floating if name != "attentive_mask" and not func.name().endswith("backward") else ():
            arg.requires_grad_()
        torch.library.opcheck(func, args)


def test_results_may_be_changed_in_place() -> None:
    case = ALL["soft_mask_attention"].cast(torch.float32)
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in case.leaves.items()}
    with softmask.backend("cpp"):
        case.call(**leaves).mul_(2.0).sum().backward()
        once = case.call(**{name: leaf.detach().requires_grad_() for name, leaf in leaves.items()})
    assert once.requires_grad and all(leaf.grad.isfinite().all() for leaf in leaves.values())


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_only_features_and_scale_of_a_contrastive_loss_get_gradients(backend: str) -> None:
    rows = cases.unit_rows(8, 5, 6, seed=0)
    constants = {name: torch.tensor(0.5, requires_grad=True) for name in ("alpha", "gamma")}
    keys = dict(zip(("image_teacher", "text_teacher", "image_queue", "text_queue"), rows[2:6], strict=True))
    for tensor in keys.values():
        tensor.requires_grad_()
    with softmask.backend(backend):
        assert not ops.momentum_contrastive_loss(rows[0], rows[1], 9.0, **keys, **constants).requires_grad
        assert not ops.focal_contrastive_loss(rows[0], rows[1], 9.0, gamma=constants["gamma"]).requires_grad
        image = rows[0].clone().requires_grad_()
        ops.momentum_contrastive_loss(image, rows[1], 9.0, **keys, **constants).backward()
    assert image.grad.any() and all(tensor.grad is None for tensor in (*keys.values(), *constants.values()))


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
