"""What holds for the kernels of every backend: autocast, second derivatives, torch.compile, registered ops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import softmask
from softmask import ops
from tests.support import kernel_cases as cases
from tests.support.kernel_cases import needs_cpp, outcome

BACKENDS = [
    pytest.param("cpp", marks=needs_cpp),
    pytest.param("triton", marks=cases.needs_triton),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# What does not depend on the size is tested at a small one.
SMALL = cases.ALL | {
    "word_attention": cases.word_attention(33, normalize="minmax"),
    "soft_mask_attention": cases.soft_mask_attention(33),
}

pytestmark = pytest.mark.usefixtures("poisoned_memory", "fast_interpreter")
for_each_backend = pytest.mark.parametrize("backend", BACKENDS)
for_each_op = pytest.mark.parametrize("name", SMALL)


@for_each_backend
@for_each_op
@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_changes_nothing(name: str, dtype: torch.dtype, backend: str) -> None:
    case = SMALL[name].cast(dtype)
    plain = outcome(backend, case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = outcome(backend, case)
    for key, value in plain.items():
        assert torch.equal(under[key], value), key


@for_each_backend
@for_each_op
def test_second_derivative_raises(name: str, backend: str) -> None:
    case = SMALL[name].cast(torch.float32)
    first = next(iter(case.leaves))
    leaves = {key: leaf.detach().requires_grad_(key not in case.constants) for key, leaf in case.leaves.items()}
    with softmask.backend(backend):
        out = case.call(**leaves, **case.fixed)
    (gradient,) = torch.autograd.grad(out.square().sum(), leaves[first], create_graph=True)
    with pytest.raises(RuntimeError, match=f"the {backend} kernel has no second derivative"):
        gradient.square().sum().backward()


@for_each_backend
@for_each_op
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_to_one_graph(name: str, compiler: str, backend: str) -> None:
    torch.compiler.reset()
    case = SMALL[name].cast(torch.float32)
    compiled = replace(case, call=torch.compile(case.call, fullgraph=True, backend=compiler))
    plain, got = outcome(backend, case), outcome(backend, compiled)
    for key, value in plain.items():
        torch.testing.assert_close(got[key], value)


class Record(TorchDispatchMode):
    """Records the registered ops that are called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "softmask":
            self.seen.append((func, tree_map_only(Tensor, Tensor.detach, args)))
        return func(*args, **(kwargs or {}))


def calls(name: str, backend: str) -> list[tuple]:
    """The calls of registered ops that a case makes, forward and backward."""
    with Record() as record:
        if name == "attentive_mask":
            patches, tokens = (cases.normal(2, count, 5, seed=0).float() for count in (7, 3))
            with softmask.backend(backend):
                ops.attentive_mask(patches, tokens, ratio=0.5)
        else:
            outcome(backend, SMALL[name].cast(torch.float32))
    assert len({func for func, _ in record.seen}) == (1 if name == "attentive_mask" else 2)
    return record.seen


@for_each_backend
@pytest.mark.parametrize("name", [*SMALL, "attentive_mask"])
def test_opcheck(name: str, backend: str) -> None:
    """Every registered op that a case reaches: its schema, its fake and its autograd, at the case's strides."""
    for func, args in calls(name, backend):
        floating = [arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()]
        for arg in floating if name != "attentive_mask" and not func.name().endswith("backward") else ():
            arg.requires_grad_()
        torch.library.opcheck(func, args)


@cases.needs_triton
@pytest.mark.parametrize("name", [*SMALL, "attentive_mask"])
def test_shapes_on_cuda_without_a_device(name: str) -> None:
    """Fake CUDA tensors through the ops, forward and backward: shapes, types and strides as on the CPU."""
    for func, args in calls(name, "triton"):
        real = func(*args)
        with FakeTensorMode() as mode:
            on_cuda = tree_map_only(Tensor, lambda tensor: mode.from_tensor(tensor).to("cuda"), args)
            fake = func(*on_cuda)
        pairs = zip(*((out,) if isinstance(out, Tensor) else out for out in (real, fake)), strict=True)
        for one, other in pairs:
            assert other.device.type == "cuda"
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@for_each_op
def test_compiles_for_cuda_without_a_device(name: str) -> None:
    """The public function on fake CUDA tensors, chosen by "auto": one graph, with the Triton op in it."""
    torch.compiler.reset()
    graphs: list[str] = []

    def record(graph: torch.fx.GraphModule, _) -> object:
        graphs.append(graph.code)
        return graph.forward

    case = SMALL[name].cast(torch.float32)
    with FakeTensorMode() as mode, torch.no_grad(), softmask.backend("auto"):
        given = {key: mode.from_tensor(one).to("cuda") for key, one in (case.leaves | case.fixed).items()}
        out = torch.compile(case.call, fullgraph=True, backend=record)(**given)
    assert out.device.type == "cuda" and len(graphs) == 1 and "softmask.triton_" in graphs[0]


@for_each_backend
def test_results_may_be_changed_in_place(backend: str) -> None:
    case = SMALL["soft_mask_attention"].cast(torch.float32)
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in case.leaves.items()}
    with softmask.backend(backend):
        case.call(**leaves, **case.fixed).mul_(2.0).sum().backward()
        again = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
        once = case.call(**again, **case.fixed)
    assert once.requires_grad and all(leaf.grad.isfinite().all() for leaf in leaves.values())


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_only_features_and_scale_of_a_contrastive_loss_get_gradients(backend: str) -> None:
    rows = cases.unit_rows(8, 5, 6, seed=0).float()
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
