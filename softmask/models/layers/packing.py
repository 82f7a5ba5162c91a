"""Captions without their padding: the real tokens of all captions one after another, and the way there and back.

Shapes never wait for the device: how many tokens there are is known to the host, from the loader or by `HostInts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Which places of a padded [N, T] hold tokens, `mask` bool; `size` S is their number. Packed order is that of the
    mask, caption by caption."""

    mask: Tensor
    size: int

    @staticmethod
    def of(mask: Tensor, size: int | None = None) -> Packing:
        """Without `size`, or where it costs nothing, the tokens are counted; on a device that waits for it."""
        return Packing(mask, int(mask.sum()) if size is None or mask.device.type == "cpu" else size)

    @staticmethod
    def full(rows: int, length: int, device: torch.device) -> Packing:
        return Packing(torch.ones(rows, length, dtype=torch.bool, device=device), rows * length)

    @staticmethod
    def cat(parts: list[Packing]) -> Packing:
        """Captions of several packings of one length T."""
        return Packing(torch.cat([part.mask for part in parts]), sum(part.size for part in parts))

    @cached_property
    def flat_index(self) -> Tensor:
        """[S] where every token stands in [N * T]."""
        return torch.nonzero_static(self.mask.flatten(), size=self.size)[:, 0]

    @cached_property
    def token_index(self) -> Tensor:
        """[N * T] which token stands at a place; where none does, nothing of use."""
        return self.mask.flatten().cumsum(0) - 1

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """[N + 1] int32 first token of every caption, and S: cu_seqlens of variable-length attention."""
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
        """[S, ...] -> [N, T, ...], zeros where there is no token."""
        if not self.is_full:
            zeros = packed.new_zeros(self.mask.numel(), *packed.shape[1:])
            packed = zeros.index_copy(0, self.flat_index, packed)
        return packed.unflatten(0, self.mask.shape)

    def with_column(self, rows: int) -> Packing:
        """One token more behind each of the `rows` captions, at [:, T]."""
        return Packing(F.pad(self.mask, (0, 1), value=True), self.size + rows)

    def take(self, rows: Tensor, size: int) -> tuple[Packing, Tensor]:
        """The captions rows [M] with `size` tokens in all, and which of our tokens theirs are, [size]."""
        taken = Packing(self.mask[rows], size)
        return taken, self.token_index.unflatten(0, self.mask.shape)[rows].flatten()[taken.flat_index]


@dataclass(frozen=True)
class OutputPositions:
    """Tokens of a packing whose last states are read: which they are, [M], and their own packing [N, T']."""

    index: Tensor
    packing: Packing

    @staticmethod
    def of(packing: Packing, chosen: Tensor, *, size: int, longest: int) -> OutputPositions:
        """The tokens of chosen [N, T] bool, `size` in all and at most `longest` in a caption."""
        index = packing.token_index[torch.nonzero_static(chosen.flatten(), size=size)[:, 0]]
        position = torch.arange(max(longest, 1), device=chosen.device)
        return OutputPositions(index, Packing(position < chosen.sum(1, keepdim=True), size))


class HostInts:
    """Integers on their way from the device to the host. Read late: what was launched meanwhile keeps it busy."""

    def __init__(self, *values: Tensor) -> None:
        numbers = torch.stack(values)
        self._arrived = None
        if numbers.is_cuda:
            numbers = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        self._numbers = numbers

    def read(self) -> list[int]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()
