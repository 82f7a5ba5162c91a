"""Modules with a process group or a queue: copying, saving, deferred initialization, inputs that differ by rank."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from softmask import ops
from softmask.ops import _distributed
from tests.support.two_ranks import run_on_two_ranks


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """A group of this process alone: the one that a trainer in an earlier test left behind, or a new one."""
    if dist.is_initialized():
        yield dist.group.WORLD
        return
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def losses(group: dist.ProcessGroup) -> list[nn.Module]:
    return [ops.FocalContrastiveLoss(gamma=2.0, group=group), ops.MomentumContrastiveLoss(4, 6, group=group)]


def test_copies_share_the_process_group(group: dist.ProcessGroup) -> None:
    for loss in losses(group):
        for one in (copy.copy(loss), copy.deepcopy(loss), copy.deepcopy(nn.Sequential(loss))[0]):
            assert one.group is group and one.gamma == loss.gamma
        assert AveragedModel(loss).module.group is group


def test_process_group_is_not_saved(group: dist.ProcessGroup) -> None:
    """Loading warns, since without the group the loss is that of one rank."""
    for loss in losses(group):
        file = io.BytesIO()
        torch.save(loss, file)
        file.seek(0)
        with pytest.warns(UserWarning, match="without its process group: set its .group again"):
            loaded = torch.load(file, weights_only=False)
        assert loaded.group is None and loaded.gamma == loss.gamma
        loaded.group = group
        assert loaded.group is group


def test_queue_on_meta_is_filled_by_to_empty() -> None:
    plain = ops.MomentumContrastiveLoss(4, 6)
    with torch.device("meta"):
        deferred = ops.MomentumContrastiveLoss(4, 6)
    assert all(buffer.is_meta for buffer in deferred.buffers())
    nn.Sequential(deferred).to_empty(device="cpu")
    for name, buffer in plain.named_buffers():
        assert torch.equal(deferred.get_buffer(name), buffer), name
    torch.testing.assert_close(plain.image_queue.norm(dim=-1), torch.ones(6))


def test_reset_parameters_refills_the_queue() -> None:
    plain, used = (ops.MomentumContrastiveLoss(4, 6) for _ in range(2))
    used.enqueue(*torch.randn(2, 3, 4), ids=torch.arange(3))
    used.reset_parameters()
    assert all(torch.equal(used.get_buffer(name), buffer) for name, buffer in plain.named_buffers())
    half = ops.MomentumContrastiveLoss(4, 6).bfloat16()
    half.reset_parameters()
    torch.testing.assert_close(half.image_queue, plain.image_queue.bfloat16())


def features(rows: int, width: int = 5, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return list(torch.nn.functional.normalize(torch.randn(2, rows, width), dim=-1).to(dtype))


def call_with_differing_inputs(rank: int) -> list[str]:
    """The error of each call whose arguments differ between the ranks."""
    queue = ops.MomentumContrastiveLoss(5, 8, group=dist.group.WORLD)

    def focal(image: Tensor, text: Tensor, ids: Tensor | None = None) -> Tensor:
        return ops.focal_contrastive_loss(image, text, 9.0, ids=ids, group=dist.group.WORLD)

    def momentum(image: Tensor, text: Tensor, ids: Tensor | None = None) -> Tensor:
        return queue(image, text, 9.0, image_teacher=image, text_teacher=text, ids=ids)

    errors = []
    for call in (focal, momentum, lambda *given: queue.enqueue(*given[:2], ids=given[2] if len(given) > 2 else None)):
        for given in (
            features(4 if rank else 3),
            [*features(4), torch.arange(4)] if rank else features(4),
            features(4, dtype=torch.bfloat16 if rank else torch.float32),
        ):
            try:
                call(*given)
                errors.append("no error")
            except ValueError as error:
                errors.append(str(error))
    return errors


def test_inputs_that_differ_between_ranks_raise_on_every_rank(tmp_path: Path) -> None:
    ranks = run_on_two_ranks(call_with_differing_inputs, tmp_path)
    for rank, errors in enumerate(ranks):
        for rows, _, dtype in (errors[:3], errors[3:6], errors[6:]):
            assert "expected as on every rank of the group: the same number of rows, got 3 to 4" in rows
            assert rows.endswith(f"here {3 + rank}")
            assert f"one floating type, got torch.{'bfloat16' if rank else 'float32'} here" in dtype
        for ids in (errors[1], errors[4]):
            assert f"ids on all or on none, got {'' if rank else 'no '}ids here" in ids
        assert errors[7] == "no error"  # rows without ids are positives of no sample


def test_rank_check_does_not_synchronize_with_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the check is an assertion on the device."""
    asserted = []
    monkeypatch.setattr(_distributed._transforms, "has_values", lambda tensor: False)
    monkeypatch.setattr(torch, "_assert_async", lambda holds, message: asserted.append((holds, message)))
    monkeypatch.setattr(dist, "all_reduce", lambda extremes, operation, group: extremes[0].add_(1))
    _distributed.check_alike("focal_contrastive_loss", "image, text", None, torch.zeros(3, 5), None)
    ((holds, message),) = asserted
    assert not holds and message == "focal_contrastive_loss: image, text differs between ranks in shape, type or ids"
