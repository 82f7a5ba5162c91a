"""Rows of all ranks of a process group, with gradient.

Convention: the loss is the mean over the local rows, and the engine (DDP, ZeRO) averages the parameters' gradients over
ranks. Summing the gathered rows' gradients over ranks in backward then makes the average exact for the global batch.
Every rank must hold the same number of rows.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gather_rows_no_grad(rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
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
