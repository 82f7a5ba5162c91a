"""Plain calls go past PyTorch's dispatcher; whatever has to see an op gets it from there, with the same results."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

import softmask
from softmask import ops
from softmask.ops import _library
from tests.kernels.test_kernel_contract import Record
from tests.support import kernel_cases as cases

pytestmark = pytest.mark.usefixtures("fast_interpreter")
BACKENDS = [pytest.param("cpp", marks=cases.needs_cpp), pytest.param("triton", marks=cases.needs_triton)]
for_each_backend = pytest.mark.parametrize("backend", BACKENDS)


class Nothing(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class OwnTensor(Tensor):
    pass


@for_each_backend
@pytest.mark.parametrize("name", cases.SMALL)
def test_a_mode_sees_the_op_and_changes_nothing(backend: str, name: str) -> None:
    case = cases.SMALL[name].cast(torch.float32)
    plain = cases.outcome(backend, case)
    with Record() as record:
        watched = cases.outcome(backend, case)
    names = [op.name().removeprefix("softmask::") for op, _ in record.seen]
    prefix = "triton_" if backend == "triton" else ""
    assert names and all(one.startswith(prefix) for one in names)
    assert any(one.endswith("_backward") for one in names) == (len(plain) > 1)
    assert plain.keys() == watched.keys()
    assert all(torch.equal(plain[key], watched[key]) for key in plain)


@for_each_backend
def test_the_profiler_sees_the_op(backend: str) -> None:
    features, maps = torch.rand(2, 5, 8, requires_grad=True), torch.rand(2, 4, requires_grad=True)
    with softmask.backend(backend), profile(activities=[ProfilerActivity.CPU]) as trace:
        ops.soft_mask(features, maps).sum().backward()
    names = {event.name for event in trace.events()}
    prefix = "softmask::triton_" if backend == "triton" else "softmask::"
    assert {f"{prefix}soft_mask", f"{prefix}soft_mask_backward"} <= names


@cases.needs_triton
def test_who_gets_the_op_from_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    dispatch = _library.Op.dispatch
    monkeypatch.setattr(_library.Op, "dispatch", lambda self, *inputs: calls.append(1) or dispatch(self, *inputs))
    features, maps = torch.rand(2, 5, 8), torch.rand(2, 4)
    with softmask.backend("triton"):
        expected = ops.soft_mask(features, maps)
        ops.soft_mask(torch.nn.Parameter(features), maps).sum().backward()
        assert not calls
        for watched in (features.as_subclass(OwnTensor), features):
            with Nothing():
                assert torch.equal(ops.soft_mask(watched, maps), expected)
        assert torch.equal(ops.soft_mask(features.as_subclass(OwnTensor), maps), expected)
    assert len(calls) == 3


@for_each_backend
def test_a_number_equals_a_tensor_to_the_bit(backend: str) -> None:
    image, text = cases.unit_rows(2, 9, 16, seed=0).float()
    keys = {"image_teacher": text, "text_teacher": image, "image_queue": image, "text_queue": text}

    def results(scale: Tensor | float, alpha: Tensor | float, gamma: Tensor | float) -> list[Tensor]:
        rows = [image.clone().requires_grad_(), text.clone().requires_grad_()]
        focal = ops.focal_contrastive_loss(*rows, scale, gamma=gamma)
        momentum = ops.momentum_contrastive_loss(*rows, scale, **keys, alpha=alpha, gamma=gamma)
        return [focal, momentum, *torch.autograd.grad(focal + momentum, rows)]

    with softmask.backend(backend):
        by_numbers = results(9, 0.25, 2)
        by_tensors = results(torch.tensor(9.0), torch.tensor(0.25), torch.tensor(2.0))
    assert all(torch.equal(one, other) for one, other in zip(by_numbers, by_tensors, strict=True))
