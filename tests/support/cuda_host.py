"""The CUDA C++ kernels on CPU tensors: csrc/cuda compiled by the C++ compiler, each GPU thread a fiber."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from softmask.ops import _backend

ROOT = Path(__file__).resolve().parents[2]
CSRC, BUILT = ROOT / "csrc" / "cuda", ROOT / "build" / "cuda_host"
COMPILER = shlex.split(os.environ.get("CXX", "g++"))
FLAGS = ["-DSOFTMASK_ON_HOST", "-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-fvisibility=hidden"]
FLAGS += ["-U_FORTIFY_SOURCE", "-fno-strict-aliasing"]  # threads switch by longjmp; packs are read as other types
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]  # only nvcc knows how to unroll loops
SANITIZED = os.environ.get("SOFTMASK_SANITIZE", "0") not in ("", "0")
if SANITIZED:
    FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
ORDERS = ("ascending", "descending", "random")
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
NORMALIZATIONS = {"none": 0, "minmax": 1, "max": 2, "sum": 3}
C_TYPES = {"int64_t": ctypes.c_int64, "float": ctypes.c_float, "bool": ctypes.c_bool}
C_TYPES |= {"Type": ctypes.c_int, "Normalize": ctypes.c_int}


def _why_not() -> str | None:
    """Why the host libraries cannot be compiled here."""
    if shutil.which(COMPILER[0]) is None:
        return f"needs a C++ compiler, {COMPILER[0]}"
    probe = [*COMPILER, "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    done = subprocess.run(probe, input="_Float16 half = 1;", text=True, capture_output=True)
    return None if done.returncode == 0 else f"{COMPILER[0]} has no _Float16 in C++, as g++ 12 has"


_REASON = _why_not()
needs_compiler = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


class HostError(RuntimeError):
    """What the emulation says of a launch that a GPU would refuse or never finish."""


def build(op: str, folder: Path = CSRC) -> ctypes.CDLL:
    """The library of an op's kernels; the same sources are compiled once."""
    passes = [f"{op}{suffix}.cu" for suffix in ("", "_backward") if (folder / f"{op}{suffix}.cu").exists()]
    return compiled(folder, *passes, f"host/{op}.cpp")


def planted(op: str, faults: dict[str, tuple[str, str]], folder: Path) -> ctypes.CDLL:
    """The library of an op's kernels in which set_fault(i) turns on the i-th of the named faults, counted from 1.

    A fault is an expression in place of the one occurrence of another or, if empty, of a statement.
    """
    shutil.copytree(CSRC, folder, dirs_exist_ok=True)
    for number, (text, fault) in enumerate(faults.values(), start=1):
        found = [path for path in folder.glob(f"{op}*") if text in path.read_text()]
        assert len(found) == 1 and found[0].read_text().count(text) == 1, f"{op}*: {text!r} is not there once"
        with_fault = f"(planted == {number} ? {fault} : {text})" if fault else f"if (planted != {number}) {text}"
        found[0].write_text(found[0].read_text().replace(text, with_fault))
    with (folder / "types.h").open("a") as types:
        types.write("inline int planted = 0;\n")
    with (folder / "host" / "interface.h").open("a") as interface:
        interface.write("SOFTMASK_EXPORT void set_fault(int number) { planted = number; }\n")
    return build(op, folder)


def compiled(folder: Path, *sources: str) -> ctypes.CDLL:
    """The library of some of a folder's files, which may include those of csrc/cuda."""
    text = b"".join(path.read_bytes() for root in (CSRC, folder) for path in sorted(root.rglob("*.*")))
    key = hashlib.sha256(text + " ".join([*COMPILER, *FLAGS, *sources]).encode()).hexdigest()[:16]
    library = BUILT / f"{key}.so"
    if not library.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        part = f"{library}.{os.getpid()}"
        command = [*COMPILER, *FLAGS, "-x", "c++", *(str(folder / source) for source in sources), "-o", part]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        os.replace(part, library)
    return ctypes.CDLL(str(library))


def call(library: ctypes.CDLL, name: str, *arguments: object, order: str = "ascending") -> None:
    """Call a function of a library, the threads running in an order between barriers."""
    library.set_order(ORDERS.index(order))
    function = getattr(library, name)
    function.restype = ctypes.c_char_p
    error = function(*arguments)
    if error is not None:
        raise HostError(error.decode())


@cache
def structure(name: str, header: str) -> type[ctypes.Structure]:
    """The C++ struct of that name, read from its header, so that the two cannot differ."""
    (body,) = re.findall(rf"struct {name} {{\n(.*?)\n}};", (CSRC / header).read_text(), re.DOTALL)
    body = re.sub("//.*", "", body)
    fields = re.findall(r"^ +(?:const )?(\w+)(\*?) (\w+);", body, re.MULTILINE)
    assert len(fields) == body.count(";")
    known = C_TYPES if name == "Rows" else C_TYPES | {"Rows": structure("Rows", "types.h")}
    typed = [(field, ctypes.c_void_p if star else known[kind]) for kind, star, field in fields]
    return type(name, (ctypes.Structure,), {"_fields_": typed})


class Kernels:
    """The launchers of an op's library, called as the extension's operators call them."""

    def __init__(self, op: str, library: ctypes.CDLL | None = None, order: str = "ascending") -> None:
        self.op, self.library, self.order = op, library or build(op), order

    def run(self, launcher: str, struct: str, **given: Any) -> None:
        kind = structure(struct, f"{self.op}.h")
        rows = dict(kind._fields_)
        values = {
            key: _rows_of(one) if rows[key] is structure("Rows", "types.h") else _address(one)
            for key, one in given.items()
            if key in rows
        }
        call(self.library, launcher, ctypes.byref(kind(**values)), order=self.order)

    def soft_mask(self, features: Tensor, maps: Tensor, strength: float, normalize: str, prefix: int) -> Tensor:
        features, by_word = _dense(features), _by_word(maps)
        out = features.new_empty((*maps.shape[:-1], *features.shape[1:]))
        given = _soft_mask(features.shape, features.dtype, by_word, strength, normalize, prefix)
        self.run("soft_mask", "SoftMask", **given, **_features(features), out=out)
        return out

    def soft_mask_backward(
        self, grad: Tensor, features: Tensor | None, maps: Tensor, strength: float, normalize: str, prefix: int,
        features_grad: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        grad, by_word = _dense(grad if maps.dim() == 3 else grad.unsqueeze(1)), _by_word(maps)
        shape = (len(grad), *grad.shape[2:])
        given = _soft_mask(shape, grad.dtype, by_word, strength, normalize, prefix) | {"d_out": grad}
        given |= dict(zip(("d_out_image", "d_out_word", "d_out_token"), grad.stride(), strict=False))
        d_features = grad.new_empty(shape if features_grad else (0,))
        d_maps = maps.new_empty(maps.shape if features is not None else (0,))
        if features_grad:
            given["d_features"] = d_features
        if features is not None:
            given |= _features(_dense(features))
            given |= {"d_maps": d_maps, "d_norms": maps.new_empty(maps.shape, dtype=torch.float32)}
        self.run("soft_mask_backward", "SoftMask", **given)
        return d_features, d_maps

    def word_attention(self, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, keep = inputs
        given, index, normalize = _word_attention(*inputs), inputs[2], inputs[-1]
        rows = _rows(given, 2 if inputs[3] is not None else 1, given["pitch"])
        maps = rows.new_empty((*index.shape[:2], given["keys"] - given["prefix"]))
        raw = maps.new_empty(maps.shape if keep and normalize != "none" else (0,))
        kept = rows if keep else rows.new_empty((0,))
        if index.numel() == 0:
            return maps.zero_(), raw.zero_(), kept.zero_()
        given |= {"attention": rows[0], "gates": rows[1] if len(rows) == 2 else None, "maps": maps, "keep": keep}
        self.run("word_attention", "WordAttention", **given, raw=raw if raw.numel() else None)
        return maps, raw, kept

    def word_attention_backward(self, grad: Tensor, raw: Tensor, kept: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        given, tensors = _word_attention(*inputs), (*inputs[:2], *inputs[3:6])
        dtypes = [given["dtype"]] * 4 + [torch.float32]
        gradients = [
            inputs[0].new_empty(0 if tensor is None else tensor.shape, dtype=dtype)
            for tensor, dtype in zip(tensors, dtypes, strict=True)
        ]
        names = ("d_query", "d_key", "d_value", "d_grad_output", "d_bias")
        given |= {name: one for name, one, tensor in zip(names, gradients, tensors, strict=True) if tensor is not None}
        d_rows, gates = _rows(given, len(kept), given["pitch"]), len(kept) == 2
        given |= {"attention": kept[0], "d_logits": d_rows[0], "query_parts": _rows(given, 1, given["width"])}
        if gates:
            given |= {"gates": kept[1], "d_gates": d_rows[1], "d_gate_sums": _rows(given, 1, 1)}
            given["grad_output_parts"] = _rows(given, 1, given["value_width"])
        given |= {"d_maps": grad.contiguous(), "d_raw": torch.empty_like(grad, memory_format=torch.contiguous_format)}
        if inputs[2].numel():
            self.run("word_attention_backward", "WordAttention", **given, raw=raw if raw.numel() else None)
        else:
            gradients = [one.zero_() for one in gradients]
        return tuple(
            one.to((inputs[0] if tensor is None else tensor).dtype)
            for one, tensor in zip(gradients, tensors, strict=True)
        )


def _address(value: Any) -> Any:
    return value.data_ptr() if isinstance(value, Tensor) else value


def _rows_of(tensor: Tensor) -> ctypes.Structure:
    return structure("Rows", "types.h")(tensor.data_ptr(), *tensor.stride()[:3])


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def _by_word(maps: Tensor) -> Tensor:
    return _dense(maps if maps.dim() == 3 else maps.unsqueeze(1))


def _features(features: Tensor) -> dict[str, Any]:
    return {"features": features, "features_image": features.stride(0), "features_token": features.stride(1)}


def _soft_mask(
    shape: tuple[int, ...], dtype: torch.dtype, maps: Tensor, strength: float, normalize: str, prefix: int
) -> dict[str, Any]:
    """What both passes take, for features of a shape and type, and maps [B, W, P']."""
    images, tokens, width = shape
    return {
        "images": images, "words": maps.shape[1], "tokens": tokens, "width": width, "prefix": prefix,
        "type": TYPES[dtype], "map_type": TYPES[maps.dtype], "normalize": NORMALIZATIONS[normalize],
        "strength": strength, "maps": maps, "maps_image": maps.stride(0), "maps_word": maps.stride(1),
    }  # fmt: skip


def _word_attention(
    query: Tensor, key: Tensor, index: Tensor, value: Tensor | None, grad_output: Tensor | None, bias: Tensor | None,
    ignored: Tensor | None, scale: float, prefix: int, normalize: str,
) -> dict[str, Any]:  # fmt: skip
    """What both passes take."""
    named = {"query": query, "key": key, "value": value, "grad_output": grad_output}
    types = {one.dtype for one in named.values() if one is not None}
    dtype = types.pop() if len(types) == 1 else torch.float32
    captions, heads, tokens, width = query.shape
    given: dict[str, Any] = {
        "captions": captions, "heads": heads, "tokens": tokens, "keys": key.shape[2], "width": width,
        "value_width": 0 if value is None else value.shape[3], "words": index.shape[1], "subtokens": index.shape[2],
        "prefix": prefix, "pitch": -(-key.shape[2] // 16) * 16, "type": TYPES[dtype], "dtype": dtype,
        "normalize": NORMALIZATIONS[normalize], "scale": scale, "index": index.contiguous(),
    }  # fmt: skip
    given |= {name: _dense(one.to(dtype)) for name, one in named.items() if one is not None}
    if bias is not None:
        given["bias"] = bias.float().contiguous()
    if ignored is not None:
        given["ignored"] = _dense(ignored)
        given["ignored_caption"] = given["ignored"].stride(0)
    return given


def _rows(given: dict[str, Any], sides: int, width: int) -> Tensor:
    rows = given["words"] * given["subtokens"]
    return torch.empty((sides, given["captions"], given["heads"], rows, width))


@contextmanager
def backend_on_host(kernels: Kernels) -> Iterator[None]:
    """Let the backend "cuda" take CPU tensors, through the registered ops, and run these kernels."""
    library = torch.library.Library("softmask", "IMPL")
    for op in (kernels.op, f"{kernels.op}_backward"):
        library.impl(f"cuda_{op}", getattr(kernels, op), "CPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backend, "_why_not_cuda", lambda *_: None)
        try:
            yield
        finally:
            library._destroy()
