"""The calls that `make gpu-report` measures: every op's kernels, forward and backward, at a real and at a small
size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softmask.kernels import (
    attentive_mask,
    contrastive,
    masked_patch_loss,
    momentum_contrastive,
    soft_mask,
    soft_mask_attention,
    word_attention,
)

Size = dict[str, int]
Fewest = Callable[[Size, int], tuple[float, float]]


@dataclass(frozen=True)
class Call:
    """One direction of an op: `run(*inputs(size, dtype, device))` launches its kernels.

    `fewest(size, itemsize)` gives the bytes and floating-point operations that no kernel avoids: each input once, each
    result once, and the products of the definition. Operations are 0 if products do not determine a kernel's time.
    """

    op: str
    direction: str
    inputs: Callable[[Size, torch.dtype, str], tuple]
    run: Callable[..., Any]
    size: Size
    small: Size
    fewest: Fewest

    @property
    def name(self) -> str:
        return f"{self.op} {self.direction}"


def _random(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _heads(batch: int, tokens: int, size: Size, *, dtype: torch.dtype, device: str) -> Tensor:
    """[B, H, T, E] as a projection leaves it: tokens before heads in memory."""
    return _random(batch, tokens, size["H"], size["E"], dtype=dtype, device=device).transpose(1, 2)


def _number(value: float, device: str) -> Tensor:
    return torch.full((), value, dtype=torch.float64, device=device)


# -- word_attention ---------------------------------------------------------------------------------------------------


def _words(size: Size, dtype: torch.dtype, device: str) -> tuple:
    like = {"dtype": dtype, "device": device}
    index = torch.full((size["B"], size["W"], 1), 3, device=device)
    query, grad_output = (_heads(size["B"], size["T"], size, **like) for _ in range(2))
    key, value = (_heads(size["B"], size["P"], size, **like) for _ in range(2))
    return (query, key, index, value, grad_output, None, None, size["E"] ** -0.5, 1, "minmax", False)


def _words_backward(size: Size, dtype: torch.dtype, device: str) -> tuple:
    arguments = _words(size, dtype, device)[:-1]
    maps = torch.rand(size["B"], size["W"], size["P"] - 1, device=device)
    kept = torch.rand(2, size["B"], size["H"], size["W"], (size["P"] + 15) // 16 * 16, device=device)
    return (maps, maps, kept, *arguments)


def _words_fewest(streams: int, tokens_written: bool) -> Fewest:
    def fewest(size: Size, itemsize: int) -> tuple[float, float]:
        of_a_token = size["B"] * size["H"] * size["E"] * itemsize
        rows = 2 * size["W"] + (2 * size["T"] if tokens_written else 0)
        return of_a_token * (streams * size["P"] + rows) + 4 * size["B"] * size["W"] * (size["P"] - 1), 0.0

    return fewest


WORDS = {"B": 64, "H": 12, "T": 30, "P": 577, "E": 64, "W": 1}
WORDS_SMALL = WORDS | {"B": 1, "H": 2}

# -- soft_mask --------------------------------------------------------------------------------------------------------


def _soft_mask(size: Size, dtype: torch.dtype, device: str) -> tuple:
    features = _random(size["B"], size["P"], size["D"], dtype=dtype, device=device)
    maps = _random(size["B"], size["P"] - 1, dtype=torch.float32, device=device)
    return features, maps, 1.0, "minmax", 1


def _soft_mask_backward(size: Size, dtype: torch.dtype, device: str) -> tuple:
    features, *rest = _soft_mask(size, dtype, device)
    return features, features, *rest, True


def _soft_mask_fewest(streams: int, maps: int) -> Fewest:
    def fewest(size: Size, itemsize: int) -> tuple[float, float]:
        of_maps = size["B"] * (size["P"] - 1) * 4
        return streams * size["B"] * size["P"] * size["D"] * itemsize + maps * of_maps, 0.0

    return fewest


SOFT_MASK = {"B": 64, "P": 577, "D": 768}
SOFT_MASK_SMALL = SOFT_MASK | {"B": 1}

# -- focal_contrastive_loss -------------------------------------------------------------------------------------------


def _pairs(size: Size, dtype: torch.dtype, device: str) -> tuple:
    image, text = (_random(size["N"], size["D"], dtype=dtype, device=device) for _ in range(2))
    options = (_number(10.0, device), 2.0, None, None, 0, True)
    return (F.normalize(image, dim=-1), F.normalize(text, dim=-1), *options)


def _pairs_backward(size: Size, dtype: torch.dtype, device: str) -> tuple:
    statistics = torch.ones(6, size["N"], device=device)
    return (statistics[0], statistics, *_pairs(size, dtype, device))


def _pairs_fewest(streams: int, products: int) -> Fewest:
    def fewest(size: Size, itemsize: int) -> tuple[float, float]:
        return streams * size["N"] * size["D"] * itemsize, 2.0 * products * size["N"] ** 2 * size["D"]

    return fewest


PAIRS = {"N": 4096, "D": 256}
PAIRS_SMALL = PAIRS | {"N": 512}

# -- momentum_contrastive_loss ----------------------------------------------------------------------------------------


def _queued(size: Size, dtype: torch.dtype, device: str) -> tuple:
    rows = [_random(size["B"], size["D"], dtype=dtype, device=device) for _ in range(4)]
    queues = [_random(size["K"], size["D"], dtype=dtype, device=device) for _ in range(2)]
    image, text, image_teacher, text_teacher = (F.normalize(one, dim=-1) for one in rows)
    numbers = (_number(10.0, device), 0.4, 0.0)
    keys = (image_teacher, text_teacher, *(F.normalize(one, dim=-1) for one in queues))
    return (image, text, image_teacher, text_teacher, *keys, *numbers, None, None, None, 0, True)


def _queued_backward(size: Size, dtype: torch.dtype, device: str) -> tuple:
    image = _random(size["B"], size["D"], dtype=dtype, device=device)
    gradients = [image.float(), image.float()]
    per_row = gradients[0][:, 0].contiguous()
    return per_row, image, image, _number(10.0, device), per_row, *gradients


def _queued_fewest(size: Size, itemsize: int) -> tuple[float, float]:
    """One stream over the keys of both sides; logits of student and teacher, and the product of their gradient."""
    keys = size["B"] + size["K"]
    return 2.0 * keys * size["D"] * itemsize, 2.0 * 3 * 2 * size["B"] * keys * size["D"]


def _queued_backward_fewest(size: Size, itemsize: int) -> tuple[float, float]:
    return 2.0 * size["B"] * size["D"] * (4 + itemsize), 0.0


QUEUED = {"B": 64, "K": 65536, "D": 256}
QUEUED_SMALL = QUEUED | {"K": 8192 - 64}

# -- soft_mask_attention ----------------------------------------------------------------------------------------------


def _shared(size: Size, dtype: torch.dtype, device: str) -> tuple:
    like = {"dtype": dtype, "device": device}
    query = _heads(size["N"], size["T"], size, **like)
    key, value = (_heads(size["B"], size["P"], size, **like) for _ in range(2))
    weight = torch.rand(size["N"], size["P"], device=device)
    index = torch.arange(size["N"], device=device) % size["B"]
    bias = _random(size["H"], size["E"], **like)
    return (query, key, value, weight, index, bias, None, size["E"] ** -0.5)


def _shared_backward(size: Size, dtype: torch.dtype, device: str) -> tuple:
    arguments = _shared(size, dtype, device)
    return (arguments[0], *arguments)


def _shared_fewest(text_streams: int, image_streams: int, products: int) -> Fewest:
    def fewest(size: Size, itemsize: int) -> tuple[float, float]:
        of_text, of_images = size["N"] * size["T"], size["B"] * size["P"]
        tokens = text_streams * of_text + image_streams * of_images
        moved = tokens * size["H"] * size["E"] * itemsize + 4 * size["N"] * size["P"]
        return moved, 2.0 * products * of_text * size["P"] * size["H"] * size["E"]

    return fewest


SHARED = {"N": 192, "B": 64, "H": 12, "T": 32, "P": 577, "E": 64}
SHARED_SMALL = SHARED | {"N": 3, "B": 1, "H": 1}

# -- attentive_mask, masked_patch_loss --------------------------------------------------------------------------------


def _patches(size: Size, dtype: torch.dtype, device: str) -> tuple:
    patches, tokens = (_random(size["B"], size[n], size["D"], dtype=dtype, device=device) for n in "PT")
    return (patches, tokens, None, size["P"] // 2, True)


def _patches_fewest(size: Size, itemsize: int) -> tuple[float, float]:
    return size["B"] * ((size["P"] + size["T"]) * size["D"] * itemsize + size["P"]), 0.0


def _pixels(size: Size, dtype: torch.dtype, device: str) -> tuple:
    side = size["side"]
    patches = (side // 16) ** 2
    prediction = _random(size["B"], patches, 768, dtype=dtype, device=device)
    mask = (torch.arange(size["B"] * patches, device=device) % 2 == 0).view(size["B"], patches)
    return (prediction, _random(size["B"], 3, side, side, dtype=dtype, device=device), mask, 16, True)


def _pixels_backward(size: Size, dtype: torch.dtype, device: str) -> tuple:
    arguments = _pixels(size, dtype, device)
    return (torch.ones(arguments[2].shape, device=device), *arguments)


def _pixels_fewest(streams: int) -> Fewest:
    """Streams count halves of the pixels: prediction and image of the masked half, and the whole gradient."""

    def fewest(size: Size, itemsize: int) -> tuple[float, float]:
        patches = size["B"] * (size["side"] // 16) ** 2
        return streams / 2 * patches * 768 * itemsize + 5 * patches, 0.0

    return fewest


PATCHES = {"B": 64, "P": 256, "T": 25, "D": 768}
PIXELS = {"B": 64, "side": 256}

CALLS = [
    Call("word_attention", "forward", _words, word_attention.forward, WORDS, WORDS_SMALL, _words_fewest(2, False)),
    Call(
        "word_attention",
        "backward",
        _words_backward,
        word_attention.backward,
        WORDS,
        WORDS_SMALL,
        _words_fewest(4, True),
    ),
    Call(
        "soft_mask",
        "forward",
        _soft_mask,
        soft_mask.forward,
        SOFT_MASK,
        SOFT_MASK_SMALL,
        _soft_mask_fewest(2, 1),
    ),
    Call(
        "soft_mask",
        "backward",
        _soft_mask_backward,
        soft_mask.backward,
        SOFT_MASK,
        SOFT_MASK_SMALL,
        _soft_mask_fewest(3, 2),
    ),
    Call("focal_contrastive_loss", "forward", _pairs, contrastive.forward, PAIRS, PAIRS_SMALL, _pairs_fewest(2, 1)),
    Call(
        "focal_contrastive_loss",
        "backward",
        _pairs_backward,
        contrastive.backward,
        PAIRS,
        PAIRS_SMALL,
        _pairs_fewest(4, 3),
    ),
    Call(
        "momentum_contrastive_loss",
        "forward",
        _queued,
        momentum_contrastive.forward,
        QUEUED,
        QUEUED_SMALL,
        _queued_fewest,
    ),
    Call(
        "momentum_contrastive_loss",
        "backward",
        _queued_backward,
        momentum_contrastive.backward,
        QUEUED,
        QUEUED_SMALL,
        _queued_backward_fewest,
    ),
    Call(
        "soft_mask_attention",
        "forward",
        _shared,
        soft_mask_attention.forward,
        SHARED,
        SHARED_SMALL,
        _shared_fewest(2, 2, 2),
    ),
    Call(
        "soft_mask_attention",
        "backward",
        _shared_backward,
        soft_mask_attention.backward,
        SHARED,
        SHARED_SMALL,
        _shared_fewest(3, 4, 5),
    ),
    Call("attentive_mask", "forward", _patches, attentive_mask.forward, PATCHES, PATCHES | {"B": 1}, _patches_fewest),
    Call(
        "masked_patch_loss", "forward", _pixels, masked_patch_loss.forward, PIXELS, PIXELS | {"B": 1}, _pixels_fewest(2)
    ),
    Call(
        "masked_patch_loss",
        "backward",
        _pixels_backward,
        masked_patch_loss.backward,
        PIXELS,
        PIXELS | {"B": 1},
        _pixels_fewest(4),
    ),
]
