"""Captions without padding: the real tokens of all captions, one after another.

Shapes never wait for the device: the host knows the number of tokens, from the loader or through `HostInts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softmask.models.config import SpecialIds


def is_cls_or_sep(input_ids: Tensor, special: SpecialIds) -> Tensor:
    """bool like input_ids: the tokens around a caption's words."""
    return (input_ids == special.cls) | (input_ids == special.sep)


@dataclass(frozen=True)
class Packing:
    """Which positions of a padded [N, T] hold tokens: `mask` bool, with `size` S of them. Packed tokens are in the same
    order, caption by caption."""

    mask: Tensor
    size: int

    @staticmethod
    def of(mask: Tensor, size: int | None = None) -> Packing:
        """Counts the tokens where `size` is None, or where counting is free; on a device it waits for the result."""
        return Packing(mask, int(mask.sum()) if size is None or mask.device.type == "cpu" else size)

    @staticmethod
    def full(rows: int, length: int, device: torch.device) -> Packing:
        return Packing(torch.ones(rows, length, dtype=torch.bool, device=device), rows * length)

    @staticmethod
    def cat(parts: list[Packing]) -> Packing:
        """The captions of several packings that have the same length T."""
        return Packing(torch.cat([part.mask for part in parts]), sum(part.size for part in parts))

    @cached_property
    def flat_index(self) -> Tensor:
        """[S] position of every token in [N * T]."""
        return torch.nonzero_static(self.mask.flatten(), size=self.size)[:, 0]

    @cached_property
    def token_index(self) -> Tensor:
        """[N * T] number of the token at every position; meaningless at padding."""
        return self.mask.flatten().cumsum(0) - 1

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """[N + 1] int32: the first token of every caption, then S."""
        return F.pad(self.mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)

    @property
    def length(self) -> int:
        return self.mask.shape[1]

    @property
    def is_full(self) -> bool:
        return self.size == self.mask.numel()

    def pack(self, padded: Tensor) -> Tensor:
        """[N, T, ...] -> [S, ...]."""
        flat = padded.flatten(0, 1)
        return flat if self.is_full else flat.index_select(0, self.flat_index)

    def pad(self, packed: Tensor) -> Tensor:
        """[S, ...] -> [N, T, ...], zeros at padding."""
        if not self.is_full:
            zeros = packed.new_zeros(self.mask.numel(), *packed.shape[1:])
            packed = zeros.index_copy(0, self.flat_index, packed)
        return packed.unflatten(0, self.mask.shape)

    def with_column(self, rows: int) -> Packing:
        """One more token after each of the `rows` captions, at [:, T]."""
        return Packing(F.pad(self.mask, (0, 1), value=True), self.size + rows)

    def take(self, rows: Tensor, size: int) -> tuple[Packing, Tensor]:
        """The captions rows [M], with `size` tokens in all, and the index [size] of their tokens among ours."""
        taken = Packing(self.mask[rows], size)
        return taken, self.token_index.unflatten(0, self.mask.shape)[rows].flatten()[taken.flat_index]


@dataclass(frozen=True)
class Packed:
    """The tokens [S, D] of N sequences."""

    tokens: Tensor
    packing: Packing

    @staticmethod
    def full(tokens: Tensor) -> Packed:
        """Sequences of one length, [N, T, D]."""
        rows, length, _ = tokens.shape
        return Packed(tokens.flatten(0, 1), Packing.full(rows, length, tokens.device))


@dataclass(frozen=True)
class OutputPositions:
    """The tokens of a packing whose last states are read: their index [M], and a packing [N, T'] of their own."""

    index: Tensor
    packing: Packing

    @staticmethod
    def of(packing: Packing, chosen: Tensor, *, size: int, longest: int) -> OutputPositions:
        """The tokens of chosen [N, T] bool, `size` in all and at most `longest` in a caption."""
        index = packing.token_index[torch.nonzero_static(chosen.flatten(), size=size)[:, 0]]
        position = torch.arange(max(longest, 1), device=chosen.device)
        return OutputPositions(index, Packing(position < chosen.sum(1, keepdim=True), size))


class HostInts:
    """Integers on their way from the device to the host. Read them late, so that the device stays busy."""

    def __init__(self, *values: Tensor) -> None:
        numbers = torch.stack(values)
        self._arrived: Any = None  # torch.cuda.Event
        if numbers.is_cuda:
            numbers = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        self._numbers = numbers

    def read(self) -> list[int]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()
