"""Arguments that all backends must treat alike: numbers and tensors, dimensions of size zero; export, FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import softmask
from softmask import ops
from tests.support import kernel_cases as cases
from tests.support.kernel_cases import Case, needs_cpp, outcome

BACKENDS = ["reference", pytest.param("cpp", marks=needs_cpp), pytest.param("triton", marks=cases.needs_triton)]
for_each_backend = pytest.mark.parametrize("backend", BACKENDS)
pytestmark = pytest.mark.usefixtures("fast_interpreter")


# -- numbers ----------------------------------------------------------------------------------------------------------


def calls_with_a_number(number: object) -> dict[str, Callable[[], Tensor]]:
    """A call for every argument that must be a plain number."""
    rows, index = torch.rand(2, 1, 3, 4), torch.zeros(2, 1, dtype=torch.int64)
    features, maps = torch.rand(2, 4, 3), torch.rand(2, 3)
    pixels = torch.rand(1, 4, 3), torch.rand(1, 3, 2, 2), torch.ones(1, 4, dtype=torch.bool)
    return {
        "strength": lambda: ops.soft_mask(features, maps, strength=number),
        "scale": lambda: ops.word_attention(rows, rows, index, scale=number),
        " scale": lambda: ops.soft_mask_attention(rows, rows, rows, scale=number),
        "ratio": lambda: ops.attentive_mask(features, features, ratio=number),
        "num_prefix_tokens": lambda: ops.word_attention(rows, rows, index, num_prefix_tokens=number),
        " num_prefix_tokens": lambda: ops.soft_mask(features, maps, num_prefix_tokens=number),
        "patch_size": lambda: ops.masked_patch_loss(*pixels, patch_size=number),
    }


@for_each_backend
@pytest.mark.parametrize("number", [torch.nn.Parameter(torch.tensor(0.5)), torch.tensor(1), "1", None])
def test_number_arguments_must_be_plain_numbers(backend: str, number: object) -> None:
    """Kernels would lose the gradient of a tensor, which the reference would give."""
    for name, call in calls_with_a_number(number).items():
        if number is None and "scale" in name:  # the default
            continue
        with (
            softmask.backend(backend),
            pytest.raises(
                ValueError, match=f"{name.strip()}: expected a (Python|whole )?n?umber|{name.strip()}: .*number"
            ),
        ):
            call()


@for_each_backend
def test_logit_scale_of_shape_1_equals_a_scalar(backend: str) -> None:
    """FSDP does not take parameters without dimensions."""
    rows = cases.unit_rows(2, 5, 8, seed=0).float()
    keys = {"image_teacher": rows[0], "text_teacher": rows[1]}
    losses = {
        "focal": lambda scale: ops.focal_contrastive_loss(rows[0], rows[1], scale, gamma=2.0),
        "momentum": lambda scale: ops.momentum_contrastive_loss(rows[0], rows[1], scale, **keys),
    }
    for loss in losses.values():
        with softmask.backend(backend):
            plain, one = (torch.full(shape, 9.0, requires_grad=True) for shape in ((), (1,)))
            expected, got = loss(plain), loss(one)
            assert torch.equal(got, expected)
            (gradient,) = torch.autograd.grad(got, one)
            assert torch.equal(gradient, torch.autograd.grad(expected, plain)[0][None])


@for_each_backend
def test_bounds_hold_for_numbers_and_tensors(backend: str) -> None:
    rows = cases.unit_rows(2, 5, 8, seed=0).float()
    keys = {"image_teacher": rows[0], "text_teacher": rows[1]}
    with softmask.backend(backend):
        for gamma in (-1.0, torch.tensor(-1.0), torch.nn.Parameter(torch.tensor(-1.0))):
            with pytest.raises(ValueError, match="gamma: expected at least 0.0, got -1.0"):
                ops.focal_contrastive_loss(*rows, 9.0, gamma=gamma)
            with pytest.raises(ValueError, match="gamma: expected at least 0.0, got -1.0"):
                ops.momentum_contrastive_loss(*rows, 9.0, gamma=gamma, **keys)
        for alpha in (1.5, torch.tensor(1.5)):
            with pytest.raises(ValueError, match="alpha: expected 0 to 1, got 1.5"):
                ops.momentum_contrastive_loss(*rows, 9.0, alpha=alpha, **keys)


def test_out_of_range_gamma_gives_nan_under_compile() -> None:
    """There is no check under torch.compile or on a GPU, where reading the value would synchronize."""
    torch.compiler.reset()
    rows = cases.unit_rows(2, 5, 8, seed=0).float()
    loss = torch.compile(ops.focal_contrastive_loss, fullgraph=True, backend="eager")
    assert loss(*rows, 9.0, gamma=torch.tensor(-1.0)).isnan()
    assert loss(*rows, 9.0, gamma=torch.tensor(1.0)).isfinite()


# -- dimensions of size zero ------------------------------------------------------------------------------------------

EMPTY = cases.SMALL | {
    "soft_mask": cases.soft_mask(4),
    "word_attention": cases.word_attention(4),
    "contrastive": cases.contrastive(4, with_ids=True),
    "momentum_contrastive": cases.momentum_contrastive(4, queue=5),
    "soft_mask_attention": cases.soft_mask_attention(4, shared=False),
    "masked_patch_loss": cases.masked_patch_loss(2),
}
# Dimensions (tensor.number) that are zero together; for an op without an entry, the first of every tensor.
FIRST = {
    name: [[f"{one}.0" for one, tensor in (case.leaves | case.fixed).items() if tensor.dim()]]
    for name, case in EMPTY.items()
}
TOGETHER = FIRST | {
    "soft_mask": [["features.0", "maps.0"], ["features.2"], ["features.1", "maps.1"]],
    "word_attention": [
        ["query.0", "key.0", "value.0", "grad_output.0", "word_index.0"],
        ["query.1", "key.1", "value.1", "grad_output.1", "value_bias.0"],
        ["query.2", "grad_output.2"],
        ["key.2", "value.2"],
        ["query.3", "key.3"],
        ["value.3", "grad_output.3", "value_bias.1"],
        ["word_index.1"],
        ["word_index.2"],
    ],
    "contrastive": [["image.0", "text.0", "ids.0"], ["image.1", "text.1"]],
    "momentum_contrastive": [
        ["image.0", "text.0", "image_teacher.0", "text_teacher.0"],
        ["image_queue.0", "text_queue.0"],
        ["image.1", "text.1", "image_teacher.1", "text_teacher.1", "image_queue.1", "text_queue.1"],
    ],
    "soft_mask_attention": [
        ["query.0", "key.0", "value.0", "key_weight.0"],
        ["query.1", "key.1", "value.1", "value_bias.0"],
        ["query.2"],
        ["key.2", "value.2", "key_weight.1"],
        ["query.3", "key.3"],
        ["value.3", "value_bias.1"],
    ],
    "masked_patch_loss": [["prediction.0", "images.0", "mask.0"], ["prediction.1", "images.2", "mask.1"]],
}


def with_zero_sizes(case: Case, dimensions: list[str]) -> Case:
    tensors = case.leaves | case.fixed
    for dimension in dimensions:
        name, index = dimension.split(".")
        tensors[name] = tensors[name].narrow(int(index), 0, 0)
    return replace(case, leaves={n: tensors[n] for n in case.leaves}, fixed={n: tensors[n] for n in case.fixed})


def result(backend: str, case: Case) -> dict[str, Tensor] | str:
    try:
        return outcome(backend, case)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("name", "index"), [(name, i) for name, all_of in TOGETHER.items() for i in range(len(all_of))]
)
def test_zero_sized_dimensions_agree_between_backends(name: str, index: int) -> None:
    """All backends give the same result or raise the same error."""
    case = with_zero_sizes(EMPTY[name].cast(torch.float32), TOGETHER[name][index])
    expected = result("reference", case)
    for backend in (["cpp"] if softmask.ops._library.MISSING is None else []) + (
        ["triton"] if cases.kernels.why_not("cpu", torch.float32) is None else []
    ):
        got = result(backend, case)
        if isinstance(expected, str):
            assert got == expected
            continue
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, msg=f"{backend}: {key}")
            assert value.isfinite().all()


# -- export and FLOPs -------------------------------------------------------------------------------------------------


@for_each_backend
@pytest.mark.parametrize("name", ["momentum_contrastive", "word_attention"])
def test_exported_call_has_gradients(name: str, backend: str) -> None:
    """The inputs need no gradient while the call is traced, yet it must save what the gradient needs."""
    case = EMPTY[name].cast(torch.float32)
    names = list(case.leaves)

    class Module(torch.nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return case.call(**dict(zip(names, given, strict=True)), **case.fixed)

    with softmask.backend(backend):
        exported = torch.export.export(Module(), tuple(case.leaves.values())).module()

    def call(**given: Tensor) -> Tensor:
        return exported(*(given[name] for name in names))

    expected, got = outcome(backend, case), outcome(backend, replace(case, call=call, fixed={}))
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_flops_are_counted(backend: str) -> None:
    """A multiplication with an addition counts as two."""
    wanted = {
        "contrastive": (cases.contrastive(9), 2 * 9 * 9 * 32),
        "momentum_contrastive": (cases.momentum_contrastive(9, queue=20), 2 * 2 * 9 * 29 * 32 * 3),
        "soft_mask_attention": (cases.soft_mask_attention(9, shared=False), 2 * 4 * 3 * 5 * 9 * (40 + 24)),
        "word_attention": (cases.word_attention(9), 2 * 3 * 3 * 4 * 9 * (40 + 24)),
    }
    for name, (case, forward) in wanted.items():
        with FlopCounterMode(display=False) as counter:
            outcome(backend, case.cast(torch.float32))
        prefix = "softmask.triton_" if backend == "triton" else "softmask."
        counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
        assert counts[prefix + name] == forward
        assert name == "momentum_contrastive" or counts[f"{prefix}{name}_backward"] >= 2 * forward
