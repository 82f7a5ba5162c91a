"""The backend switch: a named backend runs or raises with the reason; only `auto` falls back."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import softmask
from softmask import kernels, ops, reference
from softmask.ops import _backend, _library
from softmask.ops._fused import soft_mask as fused
from tests.support import kernel_cases
from tests.support.kernel_cases import needs_cpp


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs at which "auto" takes a kernel, since the map needs a gradient."""
    return torch.rand(2, 4, 3), torch.rand(2, 3, requires_grad=True)


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that records which implementations of soft_mask are called."""
    calls: list[str] = []
    plain, by_kernels = reference.soft_mask, fused.soft_mask
    monkeypatch.setattr(reference, "soft_mask", lambda *a, **k: calls.append("reference") or plain(*a, **k))
    monkeypatch.setattr(fused, "soft_mask", lambda name, *a, **k: calls.append(name) or by_kernels(name, *a, **k))
    return calls


@needs_cpp
def test_backend_contexts_nest(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record_calls(monkeypatch)
    with softmask.backend("auto"):
        ops.soft_mask(*inputs())
        with softmask.backend("reference"):
            ops.soft_mask(*inputs())
            with softmask.backend("cpp"):
                ops.soft_mask(*inputs())
            with pytest.raises(KeyError), softmask.backend("cpp"):
                raise KeyError
            ops.soft_mask(*inputs())
        ops.soft_mask(*inputs())
    assert calls == ["cpp", "reference", "cpp", "reference", "cpp"]


@needs_cpp
def test_auto_uses_pytorch_where_it_is_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record_calls(monkeypatch)
    features, maps = torch.rand(2, 4, 3), torch.rand(2, 3)
    for given in ((features, maps), (features.bfloat16(), maps), (features, torch.rand(2, 5, 3))):
        ops.soft_mask(*given)
    with softmask.backend("cpp"):
        ops.soft_mask(features, maps)
    assert calls == ["reference", "cpp", "cpp", "cpp"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("triton", "Triton kernels take fp32, fp16 and bf16, .* float64"), ("cuda", "CUDA C.. kernels take CUDA tensors")],
)
def test_named_backend_that_cannot_run_raises(name: str, reason: str) -> None:
    with (
        softmask.backend(name),
        pytest.raises(softmask.BackendError, match=f"backend '{name}' cannot run soft_mask: {reason}"),
    ):
        ops.soft_mask(*(tensor.double() for tensor in inputs()))


def test_every_op_obeys_the_backend_switch() -> None:
    patches = torch.rand(2, 3, 4)
    calls: dict[str, Callable[[], object]] = {"attentive_mask": lambda: ops.attentive_mask(patches, patches, ratio=0.5)}
    for case in kernel_cases.SMALL.values():
        calls[getattr(case.call, "func", case.call).__name__] = partial(case.call, **case.leaves, **case.fixed)
    assert sorted(calls) == [name for name in sorted(ops.__all__) if name.islower()]
    for op, call in calls.items():
        of_op = "CUDA C.. kernels take CUDA tensors, the inputs are on cpu"
        reason = of_op if op in _library.CUDA_OPS else f"only {' and '.join(_library.CUDA_OPS)} have CUDA"
        with softmask.backend("cuda"), pytest.raises(softmask.BackendError, match=f"cannot run {op}: {reason}"):
            call()
        with softmask.backend("reference"):
            call()


def test_auto_falls_back_and_cpp_raises_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "MISSING", "the extension is not built")
    calls = record_calls(monkeypatch)
    with softmask.backend("auto"):
        ops.soft_mask(*inputs())
    assert calls == ["reference"]
    with softmask.backend("cpp"), pytest.raises(softmask.BackendError, match="soft_mask: the extension is not built"):
        ops.soft_mask(*inputs())


def test_cpp_refuses_other_devices() -> None:
    on_meta = [tensor.to("meta") for tensor in inputs()]
    with (
        softmask.backend("cpp"),
        pytest.raises(softmask.BackendError, match="CPU tensors, the inputs are on meta"),
    ):
        ops.soft_mask(*on_meta)
    assert _backend.choose("cuda", op="soft_mask") == "triton" and _backend.choose("meta", op="x") == "reference"
    assert _backend.choose("cuda", torch.float64, op="soft_mask") == "reference"


def test_shapes_on_meta() -> None:
    masked = ops.soft_mask(*(tensor.to("meta") for tensor in inputs()))
    assert masked.device.type == "meta" and masked.shape == (2, 4, 3)


def test_auto_falls_back_and_triton_raises_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INSTALLED", False)
    monkeypatch.setattr(_library, "CUDA_MISSING", "not built here")
    assert _backend.choose("cuda", op="soft_mask") == "reference"
    with softmask.backend("triton"), pytest.raises(softmask.BackendError, match="Triton is not installed"):
        ops.soft_mask(*inputs())


def test_auto_takes_cuda_where_it_is_built_and_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "CUDA_MISSING", None)
    assert _backend.choose("cuda", op="soft_mask") == "triton"
    monkeypatch.setattr(kernels, "INSTALLED", False)
    assert _backend.choose("cuda", op="soft_mask") == "cuda"
    assert _backend.choose("cuda", torch.float64, op="soft_mask") == "reference"
    assert _backend.choose("cuda", op="attentive_mask") == "reference"


def test_cuda_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    why_not = partial(_backend.why_not, "cuda", op="soft_mask")
    monkeypatch.setattr(_library, "CUDA_MISSING", "not built here")
    assert why_not("cuda") == "not built here"
    assert why_not("cpu") == "CUDA C++ kernels take CUDA tensors, the inputs are on cpu"
    monkeypatch.setattr(_library, "CUDA_MISSING", None)
    assert why_not("cuda", torch.float64) == "CUDA C++ kernels take fp32, fp16 and bf16, the inputs are float64"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for major, reason in (
        (7, "CUDA C++ kernels need a GPU of compute capability 8.0 or later, this one has 7.x"),
        (8, None),
    ):
        properties = SimpleNamespace(major=major)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, found=properties: found)
        assert why_not("cuda") == reason


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend: expected one of 'auto', .*, got 'numpy'"):
        softmask.backend("numpy")


def test_backend_context_is_local_to_its_thread() -> None:
    seen = []
    with softmask.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(_backend.resolve("soft_mask", torch.ones(1))))
        thread.start()
        thread.join()
        assert _backend.resolve("soft_mask", torch.ones(1)) == "reference"
    assert seen == [_backend.resolve("soft_mask", torch.ones(1))]


@needs_cpp
def test_switch_reaches_compiled_functions() -> None:
    """A graph compiled under one backend is not reused under another."""
    graphs: list[str] = []

    def record(graph: torch.fx.GraphModule, _) -> object:
        graphs.append("cpp" if "softmask.soft_mask" in graph.code else "reference")
        return graph.forward

    compiled = torch.compile(ops.soft_mask, fullgraph=True, backend=record)
    for name in ("cpp", "reference", "cpp"):
        with softmask.backend(name):
            compiled(*inputs())
    assert graphs == ["cpp", "reference"]


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import torch, softmask; softmask.ops.soft_mask(torch.rand(2, 4, 3), torch.rand(2, 3))"
    failed = python(code, SOFTMASK_BACKEND="triton", TRITON_INTERPRET="0")
    assert "BackendError: backend 'triton' cannot run soft_mask: Triton kernels take CUDA" in failed.stderr
    monkeypatch.setenv("SOFTMASK_BACKEND", "fast")
    with pytest.raises(ValueError, match="SOFTMASK_BACKEND: expected one of 'auto', .*, got 'fast'"):
        _backend._from_environment()
    monkeypatch.setenv("SOFTMASK_BACKEND", "")
    assert _backend._from_environment() == "auto"


def test_environment_variable_set_after_import(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record_calls(monkeypatch)
    monkeypatch.setenv("SOFTMASK_BACKEND", "reference")
    ops.soft_mask(*inputs())
    monkeypatch.setenv("SOFTMASK_BACKEND", "cuda")
    with pytest.raises(softmask.BackendError, match="backend 'cuda' cannot run soft_mask"):
        ops.soft_mask(*inputs())
    with softmask.backend("reference"):  # overrides the variable
        ops.soft_mask(*inputs())
    assert calls == ["reference", "reference"]


def test_imports_are_light() -> None:
    """Importing softmask does not load torch; importing ops and kernels does not load Triton."""
    code = """
import sys
import softmask
assert softmask.__version__ and "torch" not in sys.modules
sys.modules["triton"] = None
import softmask.kernels, softmask.ops
softmask.backend
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_reference_imports_only_torch() -> None:
    tree = ast.parse(Path(reference.__file__).read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} == {"__future__", "typing", "torch"}


def test_extension_that_does_not_load_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when it was built for another torch: the warning gives the reason."""

    def undefined_symbol(name: str) -> None:
        raise ImportError("undefined symbol: c10")

    monkeypatch.setattr(_library.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(_library.importlib, "import_module", undefined_symbol)
    with pytest.warns(UserWarning, match="does not load.*undefined symbol: c10"):
        reason = _library._load("C++", "softmask._C", "a compiler")
    assert reason == "the C++ extension softmask._C does not load: undefined symbol: c10"
