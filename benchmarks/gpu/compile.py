"""Compiles a launch ahead of time, as Triton's own launcher would, with whichever Triton is installed (3.2 to 3.8)."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import triton
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from softmask.kernels._launch import Launch

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


Path = tuple[int, ...]
"""The position of a value among a kernel's arguments: its index and, within a tuple, the index there."""


def compiled(one: Launch, architecture: int) -> Any:
    """Triton's compiled kernel, with its code in `asm` and its `metadata`."""
    return triton.compile(source(one), target=GPUTarget("cuda", architecture, 32), options=one.options)


def source(one: Launch) -> ASTSource:
    signature, constants, divisible = _specialized(one)
    if TRITON < (3, 3):
        return _source_of_3_2(one, signature, constants, divisible)
    attributes = {path: [["tt.divisibility", 16]] for path in divisible}
    return ASTSource(one.kernel, signature, constants, attributes)


def specialization(one: Launch) -> tuple:
    """What the machine code depends on. Launches with the same specialization share it."""
    signature, constants, divisible = _specialized(one)
    values = tuple((name, str(value)) for name, value in constants.items())
    return one.kernel.fn, tuple(signature.items()), values, tuple(divisible), tuple(one.options.items())


def _specialized(one: Launch) -> tuple[dict[str, Any], dict[Path, Any], list[Path]]:
    """What the launcher specializes on: types, constants (including None and 1), and multiples of 16."""
    signature: dict[str, Any] = {}
    constants: dict[Path, Any] = {}
    divisible: list[Path] = []
    arguments = one.arguments
    for index, parameter in enumerate(one.kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, tuple):
            parts = [_specialize(part, (index, i), False, constants, divisible) for i, part in enumerate(value)]
            signature[parameter.name] = tuple(parts)
        else:
            fixed = parameter.is_constexpr
            signature[parameter.name] = _specialize(value, (index,), fixed, constants, divisible)
    return signature, constants, divisible


def _specialize(value: Any, path: Path, fixed: bool, constants: dict[Path, Any], divisible: list[Path]) -> str:
    """The type of one value in a signature; adds it to the constants or to the multiples of 16."""
    if fixed or value is None or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
        divisible.append(path)
    return _type(value)


def _source_of_3_2(one: Launch, signature: dict, constants: dict[Path, Any], divisible: list[Path]) -> ASTSource:
    """For Triton 3.2, in which constants have types too: a pointer's for None, and none if declared as constants."""
    from triton.backends.compiler import AttrsDescriptor

    if any(isinstance(one_type, tuple) for one_type in signature.values()):
        raise TypeError(f"{one.kernel.__name__}: Triton 3.2 takes no tuples as arguments of kernels")
    names, arguments = [parameter.name for parameter in one.kernel.params], one.arguments
    types = {
        parameter.name: {"constexpr": "*i8" if arguments[parameter.name] is None else "i32"}.get(
            signature[parameter.name], signature[parameter.name]
        )
        for parameter in one.kernel.params
        if not parameter.is_constexpr
    }
    named = {names[index]: value for (index,), value in constants.items()}
    hints = dict.fromkeys((index for (index,) in divisible), 16)
    return ASTSource(one.kernel, types, named, AttrsDescriptor.from_hints(hints))


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def lowered(one: Launch, architecture: int, form: str) -> Any:
    """The kernel after Triton's front end (ttir) or after its own passes (ttgir), which takes a fraction of a
    compilation."""
    of_kernel, target = source(one), GPUTarget("cuda", architecture, 32)
    backend = make_backend(target)
    options = backend.parse_options(dict(one.options))
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, *([of_kernel.language] if TRITON >= (3, 4) else []))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(*([options] if TRITON >= (3, 3) else []))
    given = {
        "target": target,
        "options": options,
        "codegen_fns": functions,
        "module_map": backend.get_module_map(),
        "context": context,
    }
    module = of_kernel.make_ir(**{name: given[name] for name in inspect.signature(of_kernel.make_ir).parameters})
    metadata = {"target": target, **options.__dict__}
    module = stages["ttir"](module, metadata)
    return stages["ttgir"](module, metadata) if form == "ttgir" else module
