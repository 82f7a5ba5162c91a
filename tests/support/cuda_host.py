"""The CUDA C++ kernels on CPU tensors: csrc/cuda compiled by the C++ compiler, each GPU thread a fiber."""

from __future__ import annotations

import ctypes
import getpass
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from softmask.ops import _backend

CSRC = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
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
C_TYPES = {"int64_t": ctypes.c_int64, "float": ctypes.c_float, "Type": ctypes.c_int, "Normalize": ctypes.c_int}

needs_compiler = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason=f"needs a C++ compiler, {COMPILER[0]}")


class HostError(RuntimeError):
    """What the emulation says of a launch that a GPU would refuse or never finish."""


def build(op: str, folder: Path = CSRC) -> ctypes.CDLL:
    """The library of an op's kernels; the same sources are compiled once."""
    return compiled(folder, f"{op}.cu", f"host/{op}.cpp")


def planted(op: str, line: str, fault: str, folder: Path) -> ctypes.CDLL:
    """The library of an op's kernels with a fault in place of the one occurrence of a line."""
    shutil.copytree(CSRC, folder, dirs_exist_ok=True)
    source = folder / f"{op}.cu"
    text = source.read_text()
    assert text.count(line) == 1, f"{op}.cu holds {line!r} {text.count(line)} times"
    source.write_text(text.replace(line, fault))
    return build(op, folder)


def compiled(folder: Path, *sources: str) -> ctypes.CDLL:
    text = b"".join(path.read_bytes() for path in sorted(folder.rglob("*.*")))
    key = hashlib.sha256(text + " ".join([*COMPILER, *FLAGS, *sources]).encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"softmask-cuda-host-{getpass.getuser()}-{key}.so"
    if not library.exists():
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
    typed = [(field, ctypes.c_void_p if star else C_TYPES[kind]) for kind, star, field in fields]
    return type(name, (ctypes.Structure,), {"_fields_": typed})


class Kernels:
    """The launchers of an op's library, called as the extension's operators call them."""

    def __init__(self, op: str, library: ctypes.CDLL | None = None, order: str = "ascending") -> None:
        self.op, self.library, self.order = op, library or build(op), order

    def run(self, launcher: str, struct: str, **given: Any) -> None:
        kind = structure(struct, f"{self.op}.h")
        values = {key: one.data_ptr() if isinstance(one, Tensor) else one for key, one in given.items()}
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
