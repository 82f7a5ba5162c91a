"""The C++ kernels of all ops: errors against fp64, equal bits for any number of threads, registered schemas."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import softmask
from softmask import ops
from tests.support import kernel_cases as cases
from tests.support.kernel_cases import GAMMAS, SIZES, check_errors, needs_cpp, outcome

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
    """Selects the same patches as PyTorch; no two relevances here are within rounding of each other."""
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", cases.ALL)
def test_errors_of_every_op(name: str, dtype: torch.dtype) -> None:
    check_errors("cpp", dtype, cases.ALL[name])


@pytest.mark.parametrize("deviation", [0.0, 1e-4, 1e-2])
@pytest.mark.parametrize("level", [254.9, 0.1, 1e4])
def test_masked_patch_loss_of_flat_patches(level: float, deviation: float) -> None:
    """The deviation of such a patch is far below the rounding of its pixels' sum."""
    case = cases.masked_patch_loss(16)
    images = level + deviation * case.leaves["images"]
    check_errors("cpp", torch.float32, replace(case, leaves=case.leaves | {"images": images}))


def biased(
    name: str, query: torch.Tensor, bias: torch.Tensor, type_of_grad: torch.dtype
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The op's result with a value_bias, and its gradients for an upstream gradient rounded to a type."""
    kernels = torch.ops.softmask
    if name == "word_attention":
        index = torch.tensor([[[0, 2]], [[1, -1]]])
        args = (query, query, index, query, query, bias, None, 0.3, 0, "none")
        out, *kept = kernels.word_attention(*args, True)
    else:
        args = (query, query, query, None, None, bias, None, 0.3)
        out, kept = kernels.soft_mask_attention(*args), []
    grad = cases.normal(*out.shape, seed=2).to(type_of_grad).to(out.dtype)
    return out, getattr(kernels, f"{name}_backward")(grad, *kept, *args)


@pytest.mark.parametrize("type_of_bias", [*DTYPES, torch.float64])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("name", ["word_attention", "soft_mask_attention"])
def test_value_bias_of_any_type(name: str, dtype: torch.dtype, type_of_bias: torch.dtype) -> None:
    """The bias is read in the type of the computation, and its gradient has the bias's type."""
    query = cases.normal(2, 3, 5, 8, seed=0).to(dtype)
    bias = cases.normal(3, 8, seed=1).to(type_of_bias)
    double = torch.float64 in ((dtype, type_of_bias) if name == "word_attention" else (dtype,))
    wide = torch.float64 if double else torch.float32
    type_of_grad = dtype if name == "soft_mask_attention" else wide
    got, gradients = biased(name, query, bias, type_of_grad)
    # The same in the type of the computation, rounded at the end.
    expected, wide_gradients = biased(name, query.to(wide), bias.to(wide), type_of_grad)
    assert torch.equal(got, expected.to(got.dtype))
    for one, other in zip(gradients, wide_gradients, strict=True):
        assert torch.equal(one, other.to(one.dtype))
    assert [one.dtype for one in gradients] == [dtype] * (len(gradients) - 1) + [type_of_bias]


@pytest.mark.parametrize("op", [*cases.ALL, "attentive_mask"])
def test_backends_share_one_schema(op: str) -> None:
    """The C++ op and Triton's take the same arguments and return the same number of tensors, in both directions."""

    def signature(name: str) -> tuple:
        schema = getattr(torch.ops.softmask, name).default._schema
        return [(one.name, str(one.type)) for one in schema.arguments], [str(one.type) for one in schema.returns]

    for name in (op,) if op == "attentive_mask" else (op, f"{op}_backward"):
        assert signature(name) == signature(f"triton_{name}")


def test_changing_sizes_share_one_graph() -> None:
    """Integers that depend on shapes are symbols to torch.compile."""
    from torch._dynamo.testing import CompileCounter

    def chosen(patches: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return torch.ops.softmask.attentive_mask(patches, tokens, None, patches.shape[1] // 2, True)

    def masked(features: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        return torch.ops.softmask.soft_mask(features, maps, 1.0, "max", features.shape[1] - maps.shape[1])

    for function, sizes in ((chosen, (8, 3)), (masked, (7, 4))):
        counter = CompileCounter()
        compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
        for more in (0, 7, 9):  # no two sizes of a call are equal: they would be one symbol
            first = torch.randn(2, sizes[0] + 2 * more, 6)
            second = torch.rand(2, sizes[1] + more, 6) if function is chosen else torch.rand(2, sizes[1] + more)
            assert torch.equal(compiled(first, second), function(first, second))
        assert counter.frame_count == 1
    for name in ("contrastive", "contrastive_backward", "momentum_contrastive"):
        assert "SymInt first_row" in str(getattr(torch.ops.softmask, name).default._schema)
    for name in ("word_attention", "word_attention_backward", "soft_mask_backward"):
        assert "SymInt num_prefix_tokens" in str(getattr(torch.ops.softmask, name).default._schema)
    for name in ("masked_patch_loss", "masked_patch_loss_backward"):
        assert "SymInt patch_size" in str(getattr(torch.ops.softmask, name).default._schema)


SIZED = [
    "word_attention",
    "soft_mask_attention",
    "soft_mask",
    "contrastive",
    "momentum_contrastive",
    "attentive_mask",
    "masked_patch_loss",
]


def calls_at(op: str, size: dict[str, int]) -> list[tuple]:
    """Calls of the op's kernels, forward and backward, at the given sizes."""
    kernel, backward = (getattr(torch.ops.softmask, name, None) for name in (op, f"{op}_backward"))
    b, h, t, p, w, s, e, v = (size[letter] for letter in "BHTPWSEV")
    scale, one, yes = torch.tensor(2.0), torch.tensor(1.0), torch.zeros(b, p, dtype=torch.bool)
    if op == "word_attention":
        index = torch.full((b, w, s), -1 if t == 0 else 0)
        shared = (torch.ones(b, h, t, e), torch.ones(b, h, p, e), index, torch.ones(b, h, p, v))
        args = (*shared, torch.ones(b, h, t, v), torch.ones(h, v), yes, 1.0, 0, "minmax")
        kept = (torch.ones(b, w, p), torch.ones(2, b, h, w * s, (p + 15) // 16 * 16))
        return [(kernel, (*args, True)), (backward, (torch.ones(b, w, p), *kept, *args))]
    if op == "soft_mask_attention":
        args = (torch.ones(b, h, t, e), torch.ones(b, h, p, e), torch.ones(b, h, p, v), torch.ones(b, p), None)
        args = (*args, torch.ones(h, v), yes, 1.0)
        return [(kernel, args), (backward, (torch.ones(b, h, t, v), *args))]
    if op == "soft_mask":
        options = (1.0, "sum", 0)
        features, maps = torch.ones(b, p, e), torch.ones(b, w, p)
        calls = [(kernel, (features, maps, *options))]
        return [*calls, (backward, (torch.ones(b, w, p, e), features, maps, *options, True))]
    if op == "contrastive":
        args = (torch.ones(b, e), torch.ones(b, e), scale, one, None, None, 0, True)
        return [(kernel, args), (backward, (torch.ones(b), torch.ones(6, b), *args))]
    if op == "momentum_contrastive":
        rows, queue = torch.ones(b, e), torch.ones(p, e)
        calls = [(kernel, (*[rows] * 6, queue, queue, scale, one, one, None, None, None, 0, True))]
        return [*calls, (backward, (torch.ones(b), rows, rows, scale, torch.ones(b), rows, rows))]
    if op == "attentive_mask":
        return [(kernel, (torch.ones(b, p, e), torch.ones(b, t, e), None, p // 2, True))]
    args = (torch.ones(b, p, 12), torch.ones(b, 3, 2 * p, 2), torch.ones(b, p, dtype=torch.bool), 2, True)
    return [(kernel, args), (backward, (torch.ones(b, p), *args))]


@pytest.mark.parametrize("letter", "BHTPWSEV")
@pytest.mark.parametrize("op", SIZED)
def test_zero_sizes_stay_in_bounds_and_finite(op: str, letter: str) -> None:
    """Nothing is read or written out of bounds, and results over no elements are finite."""
    sizes = dict(zip("BHTPWSEV", (2, 3, 4, 5, 2, 2, 6, 7), strict=True))
    for kernel, args in calls_at(op, sizes | {letter: 0}):
        refused = letter == "P" and op in ("word_attention", "soft_mask")
        if refused:
            with pytest.raises(ValueError, match="expected"):
                kernel(*args)
            continue
        out = kernel(*args)
        for tensor in (out,) if isinstance(out, torch.Tensor) else out:
            mean_of_nothing = op == "word_attention" and letter == "H"
            assert mean_of_nothing or tensor.isfinite().all()


def test_out_of_bounds_reads_are_refused() -> None:
    rows, scale, kernels = torch.ones(3, 4), torch.tensor(1.0), torch.ops.softmask
    with pytest.raises(ValueError, match="first_row: expected 3 rows among 2 columns"):
        kernels.contrastive(rows, rows[:2], scale, scale, None, None, 0, False)
    with pytest.raises(ValueError, match="columns: expected as many as rows, 3, got 2"):
        kernels.contrastive(rows, rows[:2], scale, scale, torch.zeros(3).long(), torch.zeros(2).long(), 0, True)
    with pytest.raises(ValueError, match="ids: expected 3 of rows and 3 of columns"):
        kernels.contrastive(rows, rows, scale, scale, torch.zeros(2).long(), torch.zeros(3).long(), 0, True)
    with pytest.raises(ValueError, match="first_row: expected 3 rows among 0 columns"):
        keys = (rows[:0], rows[:0], rows, rows)
        kernels.momentum_contrastive(*[rows] * 4, *keys, scale, scale, scale, None, None, None, 0, True)
    with pytest.raises(ValueError, match="count: expected 0 to 3, got 4"):
        kernels.attentive_mask(rows[None], rows[None], None, 4, True)
    with pytest.raises(ValueError, match="patch_size: expected at least 1, got 0"):
        kernels.masked_patch_loss(torch.ones(1, 4, 12), torch.ones(1, 3, 4, 4), torch.ones(1, 4).bool(), 0, True)
    with pytest.raises(ValueError, match="expected 4 patches of 12"):
        kernels.masked_patch_loss(torch.ones(1, 5, 12), torch.ones(1, 3, 4, 4), torch.ones(1, 5).bool(), 2, True)
    heads = torch.ones(3, 2, 4, 5)
    with pytest.raises(ValueError, match="kv_index: expected the image of each of 3 pairs"):
        kernels.soft_mask_attention(heads, heads[:2], heads[:2], None, None, None, None, 1.0)


def test_momentum_loss_without_gradients_has_no_backward() -> None:
    rows, scale, kernels = cases.unit_rows(3, 4, seed=0).float(), torch.tensor(9.0), torch.ops.softmask
    args = (*[rows] * 6, None, None, scale, scale * 0, scale * 0, None, None, None, 0, False)
    loss, at_scale, *gradients = kernels.momentum_contrastive(*args)
    assert [one.numel() for one in gradients] == [0, 0]
    with pytest.raises(RuntimeError, match="the loss was computed without gradients"):
        kernels.momentum_contrastive_backward(torch.ones_like(loss), rows, rows, scale, at_scale, *gradients)


def test_queue_ids_have_no_effect_without_batch_ids() -> None:
    """Without ids of the batch, no row of the queue is a positive."""
    rows, scale, kernels = cases.unit_rows(2, 5, 4, seed=0).float(), torch.tensor(9.0), torch.ops.softmask
    args = (*[rows[0]] * 6, rows[1], rows[1], scale, scale * 0, scale * 0, None, None)
    with_ids, without = (kernels.momentum_contrastive(*args, ids, 0, True) for ids in (torch.arange(5), None))
    assert all(torch.equal(*pair) for pair in zip(with_ids, without, strict=True))


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_contrastive_of_rows_of_any_length(spread: float, gamma: float) -> None:
    """Logits from tiny to thousands: no common shift serves all exponentials of a tile."""
    case = cases.contrastive(577, gamma=gamma, scale=20.0)
    image, text = (case.leaves[name] * (spread * cases.normal(577, 1, seed=3)).exp() for name in ("image", "text"))
    check_errors("cpp", torch.float32, replace(case, leaves=case.leaves | {"image": image, "text": text}))


def one_direction(rows: torch.Tensor, columns: torch.Tensor, ids: tuple, first_row: int) -> list[torch.Tensor]:
    """Losses and gradients of rows among columns, where the rows' own columns start at first_row."""
    scale, gamma = torch.tensor(9.0, dtype=rows.dtype), torch.tensor(2.0)
    args = (rows, columns, scale, gamma, *ids, first_row, False)
    loss, statistics = torch.ops.softmask.contrastive(*args)
    upstream = cases.normal(len(rows), seed=5).to(rows.dtype)
    return [loss, *torch.ops.softmask.contrastive_backward(upstream, statistics, *args)]


def one_direction_in_torch(rows: torch.Tensor, columns: torch.Tensor, ids: tuple, first_row: int) -> list[torch.Tensor]:
    scale = torch.tensor(9.0, dtype=rows.dtype)
    leaves = [leaf.detach().requires_grad_() for leaf in (rows, columns, scale)]
    rows, columns, scale = leaves
    own = torch.arange(len(columns)) if ids[1] is None else ids[1]
    targets = (own[first_row:, None] == own).to(rows.dtype)
    log_p = (scale * rows @ columns.T).log_softmax(dim=1)
    loss = -(targets / targets.sum(1, keepdim=True) * (1 - log_p.exp()) ** 2 * log_p).sum(1)
    upstream = cases.normal(len(rows), seed=5).to(rows.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


@pytest.mark.parametrize("with_ids", FLAGS)
@pytest.mark.parametrize(("height", "width"), [(130, 577), (577, 600), (200, 1000)])
def test_rows_of_one_rank_among_all_columns(height: int, width: int, with_ids: bool) -> None:
    """As one rank computes them. Errors against fp64 are at most twice PyTorch's, and one rounding unit."""
    rows, columns = (cases.unit_rows(count, 33, seed=count) for count in (height, width))
    first = width - height
    ids = cases.some_ids(width) if with_ids else None
    ids = (None if ids is None else ids[first:], ids)
    exact = one_direction_in_torch(rows, columns, ids, first)
    in_torch = one_direction_in_torch(rows.float(), columns.float(), ids, first)
    kernels = one_direction(rows.float(), columns.float(), ids, first)
    for got, plain, truth in zip(kernels, in_torch, exact, strict=True):
        if truth.dim() == 0:  # PyTorch's error of a single number is luck
            torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-6)
            continue
        error, of_torch = ((one - truth).square().mean().sqrt() / truth.square().mean().sqrt() for one in (got, plain))
        assert error <= 2 * of_torch + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_nonfinite_row_affects_no_other_row(junk: float) -> None:
    rows, columns = (cases.unit_rows(577, 33, seed=seed).float() for seed in (0, 1))
    loss, at_rows, _, _ = one_direction(rows, columns, (None, None), 0)
    rows[300] = junk
    got, at_broken, _, _ = one_direction(rows, columns, (None, None), 0)
    others = torch.arange(577) != 300
    assert got[300].isnan() and at_broken[300].isnan().all()
    torch.testing.assert_close(got[others], loss[others])
    torch.testing.assert_close(at_broken[others], at_rows[others])


@pytest.mark.parametrize("name", cases.ALL)
def test_bits_repeat_across_runs_and_threads(name: str) -> None:
    """With any number of threads, except in the contrastive losses, whose products BLAS splits by thread."""
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


@pytest.mark.parametrize("capability", ["avx2", pytest.param("default", marks=pytest.mark.slow)])
def test_errors_with_other_instruction_sets(capability: str) -> None:
    """Instruction sets that this CPU would not choose keep the same error bounds, in a process of their own."""
    selection = "test_word_attention or test_contrastive or test_soft_mask_attention or test_masked or test_attentive"
    selection = f"({selection} or test_momentum) and (130 or patch or attentive) or test_errors_of_every_op"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    command += ["-k", f"({selection}) and not opcheck and not bits"]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
