"""The calls whose launches have budgets besides those of cases.py: every option of every kernel, at typical and edge
widths.

Tensors have no memory. Launches with the same specialization are one variant; `variant_launches` yields each once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases import CALLS, Call
from softmask.kernels import (
    attentive_mask,
    contrastive,
    masked_patch_loss,
    momentum_contrastive,
    soft_mask,
    soft_mask_attention,
    word_attention,
)


@dataclass(frozen=True)
class Variant:
    """One call of a launcher: `run(dtype, **options)` makes its tensors and launches."""

    op: str
    direction: str
    run: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.op} {self.direction}"

    @property
    def label(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.options.items()) or "as usual"


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _heads(batch: int, tokens: int, width: int, dtype: torch.dtype, heads: int = 12) -> Tensor:
    """[B, H, T, E] as a projection leaves it: tokens before heads in memory."""
    return _empty(batch, tokens, heads, width, dtype=dtype).transpose(1, 2)


def _ids(count: int, given: bool) -> Tensor | None:
    return _empty(count, dtype=torch.int64) if given else None


def _number() -> Tensor:
    return _empty(dtype=torch.float64)


# -- word_attention ---------------------------------------------------------------------------------------------------


def _words(dtype, E=64, P=577, subtokens=1, gradcam=True, bias=False, padding=False, normalize="minmax", **_) -> tuple:
    index = _empty(64, 1, subtokens, dtype=torch.int64)
    of_text, of_image = (_heads(64, tokens, E, dtype) for tokens in (30, P))
    value, grad_output = (of_image, of_text) if gradcam else (None, None)
    ignore = _empty(64, P, dtype=torch.bool) if padding else None
    given = (of_text, of_image, index, value, grad_output, _empty(12, E, dtype=dtype) if bias else None, ignore)
    return (*given, E**-0.5, 1, normalize)


def _words_forward(dtype, keep=True, **options) -> None:
    word_attention.forward(*_words(dtype, **options), keep)


def _words_backward(dtype, P=577, subtokens=1, gradcam=True, **options) -> None:
    maps = _empty(64, 1, P - 1)
    kept = _empty(2 if gradcam else 1, 64, 12, subtokens, (P + 15) // 16 * 16)
    arguments = _words(dtype, P=P, subtokens=subtokens, gradcam=gradcam, **options)
    word_attention.backward(maps, maps, kept, *arguments)


WORDS = [
    {},
    {"bias": True},
    {"bias": True, "P": 197},
    {"bias": True, "padding": True, "P": 257, "subtokens": 3},
    {"gradcam": False, "padding": True},
    *({"normalize": name, "bias": True} for name in ("none", "max", "sum")),
    *({"E": width, "bias": True} for width in (32, 80, 128)),
]
WORDS_FORWARD = [*WORDS, {"keep": False}, {"keep": False, "bias": True}, {"keep": False, "gradcam": False}]

# -- soft_mask --------------------------------------------------------------------------------------------------------


def _soft_mask_forward(dtype, D=768, P=577, words=1, normalize="minmax") -> None:
    soft_mask.forward(_empty(64, P, D, dtype=dtype), _empty(64, words, P - 1), 1.0, normalize, 1)


def _soft_mask_backward(dtype, D=768, P=577, words=1, normalize="minmax", features=True, features_grad=True) -> None:
    given = _empty(64, P, D, dtype=dtype) if features else None
    grad = _empty(64, words, P, D, dtype=dtype)
    soft_mask.backward(grad, given, _empty(64, words, P - 1), 1.0, normalize, 1, features_grad)


SOFT_MASK = [
    {},
    {"words": 3},
    *({"normalize": name} for name in ("none", "max", "sum")),
    *({"D": width, "P": 257} for width in (64, 257, 1024)),
]
SOFT_MASK_BACKWARD = [*SOFT_MASK, {"features": False}, {"features_grad": False}]

# -- focal_contrastive_loss -------------------------------------------------------------------------------------------


def _pairs(dtype, N=4096, D=256, ids=False, both=True) -> tuple:
    rows = _empty(N, D, dtype=dtype)
    return (rows, rows, _number(), _number(), _ids(N, ids), _ids(N, ids), 0, both)


def _pairs_forward(dtype, **options) -> None:
    contrastive.forward(*_pairs(dtype, **options))


def _pairs_backward(dtype, atomics=False, N=4096, **options) -> None:
    before, contrastive.ATOMICS = contrastive.ATOMICS, atomics
    try:
        contrastive.backward(_empty(N), _empty(7, N), *_pairs(dtype, N=N, **options))
    finally:
        contrastive.ATOMICS = before


PAIRS = [
    *({"ids": ids, "both": both} for ids in (False, True) for both in (True, False)),
    *({"D": 257, "ids": ids} for ids in (False, True)),
    *({"N": 65536, "D": width, "ids": ids} for width in (64, 256, 257) for ids in (False, True)),
]
PAIRS_BACKWARD = [
    *({"D": width, "N": 4096} for width in (64, 256, 257, 512, 768)),
    *({"D": width, "N": 256} for width in (32, 256)),
    *({"D": width, "ids": True} for width in (32, 64, 256, 257, 768)),
    {"both": False},
    {"both": False, "ids": True},
    {"D": 256, "atomics": True},
    {"D": 256, "atomics": True, "ids": True},
]

# -- momentum_contrastive_loss ----------------------------------------------------------------------------------------


def _queued_forward(dtype, D=256, B=64, K=65536, ids=False, columns=False, gradient=True) -> None:
    """`ids`: of the batch and the queue. `columns`: the queue is stored by columns, as in the published methods."""
    rows = _empty(B, D, dtype=dtype)
    queue = (_empty(D, K, dtype=dtype).T if columns else _empty(K, D, dtype=dtype)) if K else None
    numbers = (_number(), _number(), _number())
    known = (_ids(B, ids), _ids(B, ids), _ids(K, ids and K > 0))
    momentum_contrastive.forward(*[rows] * 6, queue, queue, *numbers, *known, 0, gradient)


def _queued_backward(dtype, D=256) -> None:
    image, per_row, gradients = _empty(64, D, dtype=dtype), _empty(64), _empty(64, D)
    momentum_contrastive.backward(per_row, image, image, _number(), per_row, gradients, gradients)


QUEUED = [
    *({"D": width} for width in (64, 256, 257, 512, 768)),
    {"ids": True},
    {"ids": True, "columns": True},
    {"K": 0},
    {"K": 0, "ids": True},
    {"gradient": False},
    {"gradient": False, "ids": True, "D": 768},
]

# -- soft_mask_attention ----------------------------------------------------------------------------------------------


def _shared(dtype, E=64, T=32, P=577, weight=True, index=True, bias=True, padding=False) -> tuple:
    pairs, images = 192, 64 if index else 192
    of_images = _heads(images, P, E, dtype)
    return (
        _heads(pairs, T, E, dtype),
        of_images,
        of_images,
        _empty(pairs, P) if weight else None,
        _ids(pairs, index),
        _empty(12, E, dtype=dtype) if bias else None,
        _empty(images, P, dtype=torch.bool) if padding else None,
        E**-0.5,
    )


def _shared_forward(dtype, **options) -> None:
    soft_mask_attention.forward(*_shared(dtype, **options))


def _shared_backward(dtype, **options) -> None:
    arguments = _shared(dtype, **options)
    soft_mask_attention.backward(arguments[0], *arguments)


SHARED = [
    {},
    {"weight": False, "index": False, "bias": False},
    {"index": False, "padding": True},
    {"weight": False, "bias": False},
    {"T": 8, "P": 197},
    {"T": 80, "P": 257},
    *({"E": width} for width in (32, 80, 128)),
    {"E": 128, "T": 80, "padding": True},
]

# -- attentive_mask, masked_patch_loss --------------------------------------------------------------------------------


def _patches(dtype, T=25, D=768, padding=False, high=True) -> None:
    ignore = _empty(64, T, dtype=torch.bool) if padding else None
    given = (_empty(64, count, D, dtype=dtype) for count in (256, T))
    attentive_mask.forward(*given, ignore, 128, high)


def _pixels(dtype, run, grad, patch=16, normalize=True, channels_last=False) -> None:
    side = 14 * patch
    images = _empty(64, 3, side, side, dtype=dtype)
    images = images.to(memory_format=torch.channels_last) if channels_last else images
    prediction, mask = _empty(64, 196, 3 * patch**2, dtype=dtype), _empty(64, 196, dtype=torch.bool)
    run(*[_empty(64, 196)] * grad, prediction, images, mask, patch, normalize)


def _pixels_forward(dtype, **options) -> None:
    _pixels(dtype, masked_patch_loss.forward, 0, **options)


def _pixels_backward(dtype, **options) -> None:
    _pixels(dtype, masked_patch_loss.backward, 1, **options)


PATCHES = [
    {},
    {"padding": True, "high": False},
    {"D": 257},
    {"T": 64},
    {"T": 100},
    {"T": 130, "padding": True},
    {"T": 257, "D": 257},
]
PIXELS = [{}, {"normalize": False}, {"patch": 14}, {"patch": 32}, {"channels_last": True}]

VARIANTS = [
    Variant(op, direction, run, options)
    for op, direction, run, every in (
        ("word_attention", "forward", _words_forward, WORDS_FORWARD),
        ("word_attention", "backward", _words_backward, WORDS),
        ("soft_mask", "forward", _soft_mask_forward, SOFT_MASK),
        ("soft_mask", "backward", _soft_mask_backward, SOFT_MASK_BACKWARD),
        ("focal_contrastive_loss", "forward", _pairs_forward, PAIRS),
        ("focal_contrastive_loss", "backward", _pairs_backward, PAIRS_BACKWARD),
        ("momentum_contrastive_loss", "forward", _queued_forward, QUEUED),
        ("momentum_contrastive_loss", "backward", _queued_backward, [{"D": width} for width in (32, 256, 257, 768)]),
        ("soft_mask_attention", "forward", _shared_forward, SHARED),
        ("soft_mask_attention", "backward", _shared_backward, SHARED),
        ("attentive_mask", "forward", _patches, PATCHES),
        ("masked_patch_loss", "forward", _pixels_forward, PIXELS),
        ("masked_patch_loss", "backward", _pixels_backward, PIXELS),
    )
    for options in every
]


def _as_measured(call: Call) -> Callable[..., Any]:
    """A call of cases.py at its own size, without memory."""
    return lambda dtype: call.run(*call.inputs(call.size, dtype, "meta"))


# An op without options of its own needs no entry above.
VARIANTS += [
    Variant(call.op, call.direction, _as_measured(call))
    for call in CALLS
    if call.name not in {variant.name for variant in VARIANTS}
]


def variant_launches(precision: str, architecture: int) -> Iterator[tuple[Variant, Any]]:
    """Every variant with its launches of one type, once per specialization."""
    from benchmarks.gpu.compile import specialization
    from benchmarks.gpu.report import launched

    seen = set()
    for variant in VARIANTS:
        for one in launched(lambda dtype, of=variant: of.run(dtype, **of.options), precision, architecture):
            key = specialization(one)
            if key not in seen and (precision != "tf32" or "tf32" in _precisions(one)):
                seen.add(key)
                yield variant, one


def _precisions(one: Any) -> list[str]:
    return [value for name, value in one.arguments.items() if name.endswith("PRECISION")]
