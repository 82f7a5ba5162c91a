"""Gathers rows across a process group with gradients, and stores the group in a module.

The loss is the mean over local rows, and the engine (DDP, ZeRO) averages the parameters' gradients over ranks. Summing
the gathered rows' gradients over ranks in the backward pass makes that average exact for the global batch. All ranks
must hold the same number of rows. This is checked, because collectives of unequal sizes hang or mix up rows.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from softmask.ops import _checks, _transforms


class GroupShared:
    """Holds a module's process group: shared by copies of the module, left out of files."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group

    def __copy__(self) -> GroupShared:
        return self

    def __deepcopy__(self, memo: dict) -> GroupShared:
        return self

    def __reduce__(self) -> tuple:
        return _without_group, (self.group is not None,)


def _without_group(had_one: bool) -> GroupShared:
    if had_one:
        warnings.warn("a softmask loss was loaded without its process group: set its .group again", stacklevel=2)
    return GroupShared(None)


class OverRanks(nn.Module):
    """A loss over the rows of all ranks of `group`, or of this process if it is None."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self._group = GroupShared(group)

    @property
    def group(self) -> dist.ProcessGroup | None:
        return self._group.group

    @group.setter
    def group(self, group: dist.ProcessGroup | None) -> None:
        self._group = GroupShared(group)


def check_alike(
    op: str, name: str, group: dist.ProcessGroup, rows: Tensor, ids: Tensor | None, *others: Tensor
) -> None:
    """Raise on every rank if ranks differ in the shape [B, D] or dtype of rows, or in whether they pass ids."""
    acting = _transforms.acting_on((rows, *others))
    if acting is not None:
        raise RuntimeError(f"{op}: group= has no rule for {acting}; gather the features first and leave group out")
    here = (*rows.shape, _checks.FLOATING.index(rows.dtype), 0 if ids is None else 1)
    numbers = torch.cat([torch.full((1,), number, device=rows.device) for number in here])
    extremes = torch.cat([numbers, -numbers])
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    most, least = extremes[: len(here)], -extremes[len(here) :]
    if not _transforms.has_values(extremes):  # without a wait for the device
        torch._assert_async((most == least).all(), f"{op}: {name} differs between ranks in shape, type or ids")
        return
    for what, low, high in zip(("rows", "features", "type", "ids"), least.tolist(), most.tolist(), strict=True):
        if low != high:
            _checks.fail(name, f"as on every rank of the group: {_EXPECTED[what]}", _got(what, low, high, rows, ids))


_EXPECTED = {
    "rows": "the same number of rows",
    "features": "the same number of features",
    "type": "one floating type",
    "ids": "ids on all or on none",
}


def _got(what: str, low: int, high: int, rows: Tensor, ids: Tensor | None) -> str:
    if what == "ids":
        return f"{'no ' if ids is None else ''}ids here"
    if what == "type":
        return f"{rows.dtype} here"
    return f"{low} to {high}, here {rows.shape[what == 'features']}"


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gather_rows_no_grad(rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        wide = torch.promote_types(grad.dtype, torch.float32)  # half precision would round at every rank
        total = grad.to(wide, copy=True, memory_format=torch.contiguous_format)  # all_reduce writes in place
        dist.all_reduce(total, group=ctx.group)
        rows = len(total) // dist.get_world_size(ctx.group)
        return total.narrow(0, dist.get_rank(ctx.group) * rows, rows).to(grad.dtype), None


def gather_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, ...] of each rank -> [world * B, ...] in order of ranks; gradients are summed over ranks."""
    return _GatherRows.apply(rows, group)


def gather_rows_no_grad(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, ...] of each rank -> [world * B, ...] in order of ranks."""
    # torch 2.14 renames it and warns at each call of the old name.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gathered = rows.new_empty((len(rows) * dist.get_world_size(group), *rows.shape[1:]))
    all_gather(gathered, rows.detach().contiguous(), group=group)
    return gathered


def first_row(rows: Tensor, group: dist.ProcessGroup) -> int:
    """Where this rank's rows start among the gathered ones."""
    return dist.get_rank(group) * len(rows)
