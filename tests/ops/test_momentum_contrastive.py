"""momentum_contrastive_loss against ALBEF's code (clone, concatenate, cross-entropy); its queue; two processes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from softmask import ops
from tests.support.two_ranks import average_gradients, own_half, run_on_two_ranks

pytestmark = pytest.mark.usefixtures("each_backend")

GAMMAS = [0.0, 0.5, 2.0]


@dataclass
class Case:
    image: Tensor
    text: Tensor
    image_teacher: Tensor
    text_teacher: Tensor
    image_queue: Tensor
    text_queue: Tensor
    ids: Tensor
    queue_ids: Tensor

    def keys(self, *, queue: bool = True, ids: bool = False) -> dict[str, Tensor]:
        names = ["image_teacher", "text_teacher"]
        names += ["image_queue", "text_queue"] if queue else []
        names += ["ids"] if ids else []
        names += ["queue_ids"] if ids and queue else []
        return {name: getattr(self, name) for name in names}


def make(batch: int = 5, width: int = 4, queue: int = 7, *, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def rows(count: int) -> Tensor:
        return F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=-1)

    return Case(
        *(rows(batch) for _ in range(4)),
        *(rows(queue) for _ in range(2)),
        ids=torch.randint(4, (batch,), generator=generator),
        queue_ids=torch.randint(-1, 4, (queue,), generator=generator),
    )


def albef(case: Case, scale: Tensor, alpha: float, *, queue: bool, ids: bool) -> Tensor:
    """As in ALBEF's code, for gamma = 0: [D, K] buffers, clone, cat, soft targets, two cross-entropies."""
    temperature = 1 / scale
    image_keys, text_keys = case.image_teacher.t(), case.text_teacher.t()
    if queue:
        image_keys = torch.cat([image_keys, case.image_queue.t().clone().detach()], dim=1)
        text_keys = torch.cat([text_keys, case.text_queue.t().clone().detach()], dim=1)
    with torch.no_grad():
        if ids:
            all_ids = torch.cat([case.ids, case.queue_ids]) if queue else case.ids
            positive = torch.eq(case.ids.view(-1, 1), all_ids.view(1, -1)).double()
            hard = positive / positive.sum(1, keepdim=True)
        else:
            hard = torch.zeros(len(case.image), text_keys.shape[1], dtype=torch.float64)
            hard.fill_diagonal_(1)
        i2t_targets = alpha * F.softmax(case.image_teacher @ text_keys / temperature, dim=1) + (1 - alpha) * hard
        t2i_targets = alpha * F.softmax(case.text_teacher @ image_keys / temperature, dim=1) + (1 - alpha) * hard
    i2t = -torch.sum(F.log_softmax(case.image @ text_keys / temperature, dim=1) * i2t_targets, dim=1).mean()
    t2i = -torch.sum(F.log_softmax(case.text @ image_keys / temperature, dim=1) * t2i_targets, dim=1).mean()
    return (i2t + t2i) / 2


@pytest.mark.parametrize("queue", [True, False])
@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("batch", [1, 5, 63])
def test_gamma_zero_equals_albef(queue: bool, ids: bool, batch: int) -> None:
    case = make(batch, queue=130)
    scale = torch.tensor(14.0, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (case.image, case.text, scale)]
    for alpha in (0.0, 0.4, 1.0):
        expected = albef(case, scale, alpha, queue=queue, ids=ids)
        loss = ops.momentum_contrastive_loss(
            case.image, case.text, scale, alpha=torch.tensor(alpha), **case.keys(queue=queue, ids=ids)
        )
        torch.testing.assert_close(loss, expected)
        for got, want in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("ids", [True, False])
def test_equals_focal_formula(gamma: float, ids: bool) -> None:
    """Per sample and key, in Python's floats; without queue_ids no queue row is a positive."""
    case, scale, alpha = make(), 9.0, 0.3

    def softmax(logits: list[float]) -> list[float]:
        weights = [math.exp(z - max(logits)) for z in logits]
        return [weight / sum(weights) for weight in weights]

    def side(student: Tensor, teacher: Tensor, keys: Tensor, key_ids: list[int | None]) -> list[float]:
        losses = []
        for i, (row, soft_row) in enumerate(zip(student, teacher, strict=True)):
            p, soft = softmax((scale * keys @ row).tolist()), softmax((scale * keys @ soft_row).tolist())
            own = [key_id == key_ids[i] for key_id in key_ids] if ids else [j == i for j in range(len(keys))]
            target = [alpha * s + (1 - alpha) * hit / sum(own) for s, hit in zip(soft, own, strict=True)]
            losses.append(-sum(y * (1 - q) ** gamma * math.log(q) for y, q in zip(target, p, strict=True)))
        return losses

    key_ids = [*case.ids.tolist(), *[None] * 7]
    i2t = side(case.image, case.image_teacher, torch.cat([case.text_teacher, case.text_queue]), key_ids)
    t2i = side(case.text, case.text_teacher, torch.cat([case.image_teacher, case.image_queue]), key_ids)
    expected = torch.tensor([(a + b) / 2 for a, b in zip(i2t, t2i, strict=True)], dtype=torch.float64)
    options = {**case.keys(), "alpha": alpha, "gamma": gamma, "ids": case.ids if ids else None}
    for reduction, reduced in {"none": expected, "mean": expected.mean(), "sum": expected.sum()}.items():
        loss = ops.momentum_contrastive_loss(case.image, case.text, scale, reduction=reduction, **options)
        torch.testing.assert_close(loss, reduced)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_gradcheck(gamma: float) -> None:
    case = make(3, 3, 4)
    leaves = (case.image.requires_grad_(), case.text.requires_grad_())
    options = {"gamma": gamma, **case.keys(ids=True)}
    assert torch.autograd.gradcheck(
        lambda image, text: ops.momentum_contrastive_loss(image, text, 5.0, alpha=0.4, **options), leaves
    )
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)  # the teacher's scale is a constant: alpha = 0
    assert torch.autograd.gradcheck(
        lambda *args: ops.momentum_contrastive_loss(*args, alpha=0.0, **options), (*leaves, scale)
    )


def test_keys_get_no_gradient_and_queues_may_be_strided() -> None:
    case = make()
    keys = {name: tensor.requires_grad_() for name, tensor in case.keys().items()}
    image = case.image.requires_grad_()
    loss = ops.momentum_contrastive_loss(image, case.text, 5.0, **keys)
    loss.backward()
    assert image.grad.any() and all(tensor.grad is None for tensor in keys.values())
    columns = {name: keys[name].detach().T.contiguous() for name in ("image_queue", "text_queue")}  # [D, K] buffers
    strided = {**keys, **{name: tensor.T for name, tensor in columns.items()}}
    torch.testing.assert_close(ops.momentum_contrastive_loss(image, case.text, 5.0, **strided), loss)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_without_teacher_and_queue_equals_focal_contrastive_loss(gamma: float) -> None:
    """Teachers equal to the students, hard targets, no queue."""
    case = make()
    loss = ops.momentum_contrastive_loss(
        case.image,
        case.text,
        5.0,
        image_teacher=case.image,
        text_teacher=case.text,
        alpha=0.0,
        gamma=gamma,
        ids=case.ids,
    )
    torch.testing.assert_close(loss, ops.focal_contrastive_loss(case.image, case.text, 5.0, gamma=gamma, ids=case.ids))


@pytest.mark.parametrize("gamma", GAMMAS)
def test_extremes_stay_finite(gamma: float) -> None:
    eye = torch.eye(4, requires_grad=True)
    loss = ops.momentum_contrastive_loss(eye, eye, 1000.0, image_teacher=eye, text_teacher=eye, gamma=gamma)
    assert loss.item() == 0.0 and not torch.autograd.grad(loss, eye)[0].any()
    case = make(7, 16, 257)
    image = case.image.float().requires_grad_()
    keys = {name: tensor.float() for name, tensor in case.keys().items()}
    loss = ops.momentum_contrastive_loss(image, case.text.float(), 100.0, gamma=gamma, **keys)
    assert loss.isfinite() and torch.autograd.grad(loss, image)[0].isfinite().all()
    empty = make(0)
    scale = torch.tensor(5.0, requires_grad=True)
    loss = ops.momentum_contrastive_loss(empty.image, empty.text, scale, gamma=gamma, **empty.keys())
    assert loss.item() == 0.0 and torch.autograd.grad(loss, scale)[0].item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_accumulates_in_fp32(dtype: torch.dtype) -> None:
    case = make()
    inputs = {"image": case.image, "text": case.text, **case.keys()}
    low = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    expected = ops.momentum_contrastive_loss(
        **{name: tensor.float() for name, tensor in low.items()}, logit_scale=9.0, gamma=1.0
    )
    assert expected.dtype == torch.float32
    assert torch.equal(ops.momentum_contrastive_loss(**low, logit_scale=9.0, gamma=1.0), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.momentum_contrastive_loss(**low, logit_scale=9.0, gamma=1.0), expected)


def test_queue_is_a_ring_buffer() -> None:
    """Compared with a Python list, for batches of any size up to K."""
    module = ops.MomentumContrastiveLoss(3, 5)
    rows = [
        (image.tolist(), text.tolist(), -1) for image, text in zip(module.image_queue, module.text_queue, strict=True)
    ]
    assert torch.allclose(module.image_queue.norm(dim=-1), torch.ones(5))
    assert not torch.equal(module.image_queue, module.text_queue)
    pointer = 0
    for step, count in enumerate([2, 2, 3, 5, 1, 0]):
        image, text = torch.randn(2, count, 3)
        ids = None if step == 2 else torch.arange(count) + 10 * step
        module.enqueue(image, text, ids=ids)
        for i in range(count):
            rows[pointer] = (image[i].tolist(), text[i].tolist(), -1 if ids is None else ids[i].item())
            pointer = (pointer + 1) % 5
        assert module.queue_pointer.item() == pointer
        got = zip(module.image_queue.tolist(), module.text_queue.tolist(), module.queue_ids.tolist(), strict=True)
        assert list(got) == rows
    with pytest.raises(ValueError, match="image_teacher: expected at most queue_size = 5 rows over all ranks, got 6"):
        module.enqueue(*torch.randn(2, 6, 3))
    with pytest.raises(ValueError, match=r"text_teacher: expected shape \[2, 3\], got \[1, 3\]"):
        module.enqueue(torch.randn(2, 3), torch.randn(1, 3))
    rows = torch.randn(2, 3)
    with pytest.raises(ValueError, match="ids: expected int64, got torch.int32"):
        module.enqueue(rows, rows, ids=torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="text_teacher: expected float32 or .*, got torch.int64"):
        module.enqueue(rows, rows.long())
    with pytest.raises(ValueError, match="image_teacher: expected device cpu, got meta"):
        module.enqueue(rows.to("meta"), rows)


def test_module_equals_function() -> None:
    case = make()
    module = ops.MomentumContrastiveLoss(4, 7, alpha=0.2, gamma=1.0).double()
    module.enqueue(case.image_queue[:5], case.text_queue[:5], ids=case.queue_ids[:5])
    teachers = case.keys(queue=False)
    queues = {"image_queue": module.image_queue, "text_queue": module.text_queue}
    common = {"gamma": 1.0, **teachers, **queues}
    torch.testing.assert_close(
        module(case.image, case.text, 5.0, **teachers),
        ops.momentum_contrastive_loss(case.image, case.text, 5.0, alpha=0.2, **common),
    )
    torch.testing.assert_close(
        module(case.image, case.text, 5.0, alpha=0.7, ids=case.ids, **teachers),
        ops.momentum_contrastive_loss(
            case.image, case.text, 5.0, alpha=0.7, ids=case.ids, queue_ids=module.queue_ids, **common
        ),
    )
    restored = ops.MomentumContrastiveLoss(4, 7).double()
    restored.load_state_dict(module.state_dict())
    assert restored.queue_pointer.item() == 5 and torch.equal(restored.image_queue, module.image_queue)


def test_queue_size_zero_means_no_queue() -> None:
    case = make()
    module = ops.MomentumContrastiveLoss(4, 0, alpha=0.4)
    teachers = case.keys(queue=False, ids=True)
    expected = ops.momentum_contrastive_loss(case.image, case.text, 5.0, **teachers)
    module.enqueue(case.image_teacher, case.text_teacher, ids=case.ids)
    assert torch.equal(module(case.image, case.text, 5.0, **teachers), expected)


def test_compile() -> None:
    """fullgraph proves that loss and queue do not synchronize with the host; alpha may change without recompiling."""
    case = make()
    module = ops.MomentumContrastiveLoss(4, 7).double()
    restored = ops.MomentumContrastiveLoss(4, 7).double()
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import, and the two ranks import this file

    counter = CompileCounterWithBackend("aot_eager")

    def step(loss: ops.MomentumContrastiveLoss, image: Tensor, alpha: Tensor) -> Tensor:
        teachers = {"image_teacher": case.image_teacher, "text_teacher": case.text_teacher, "ids": case.ids}
        return loss(image, case.text, 5.0, alpha=alpha, **teachers)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    enqueue = torch.compile(module.enqueue, fullgraph=True, backend="aot_eager")
    for alpha in (0.0, 0.2, 0.4):
        losses, gradients = [], []
        for function, loss in ((compiled, module), (step, restored)):
            image = case.image.clone().requires_grad_()
            losses.append(function(loss, image, torch.tensor(alpha)))
            gradients += torch.autograd.grad(losses[-1], image)
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*gradients)
        enqueue(case.image_teacher, case.text_teacher, ids=case.ids)
        restored.enqueue(case.image_teacher, case.text_teacher, ids=case.ids)
        assert torch.equal(module.queue_ids, restored.queue_ids) and torch.equal(
            module.image_queue, restored.image_queue
        )
    assert counter.frame_count == 1


def train_two_steps(rank: int | None) -> dict[str, object]:
    """Two steps with a queue of 12: the second sees the first's features. rank None: one process, whole batch."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(2, 2, 8, 4, generator=generator, dtype=torch.float64)
    parameters = [
        torch.randn(4, 5, generator=generator, dtype=torch.float64).requires_grad_(),
        torch.tensor(6.0, dtype=torch.float64, requires_grad=True),
    ]
    ids = torch.tensor([[0, 1, 2, 3, 0, 5, 1, 0], [4, 1, 0, 0, 6, 1, 7, 2]])
    group = None if rank is None else dist.group.WORLD
    module = ops.MomentumContrastiveLoss(5, 12, gamma=2.0, group=group).double()
    losses, gradients = [], []
    for step in range(2):
        for given in (None, ids[step]):
            local = [inputs[step, 0], inputs[step, 1], given]
            if rank is not None:
                local = [None if tensor is None else own_half(tensor, rank) for tensor in local]
            image, text = (F.normalize(side @ parameters[0], dim=-1) for side in local[:2])
            image_teacher, text_teacher = (F.normalize(side @ parameters[0].tanh(), dim=-1) for side in local[:2])
            teachers = {"image_teacher": image_teacher, "text_teacher": text_teacher, "ids": local[2]}
            loss = module(image, text, parameters[1], **teachers)
            loss.backward()
            losses.append(loss.detach())
            gradients += [p.grad.clone() for p in parameters] if rank is None else average_gradients(parameters)
            for parameter in parameters:
                parameter.grad = None
        module.enqueue(image_teacher, text_teacher, ids=local[2])
    return {"losses": torch.stack(losses), "gradients": gradients, "queue": dict(module.named_buffers())}


def test_two_processes_equal_one(tmp_path: Path) -> None:
    ranks = run_on_two_ranks(train_two_steps, tmp_path)
    one = train_two_steps(None)
    torch.testing.assert_close((ranks[0]["losses"] + ranks[1]["losses"]) / 2, one["losses"])
    for rank in ranks:
        torch.testing.assert_close(rank["gradients"], one["gradients"])
        torch.testing.assert_close(rank["queue"], one["queue"])


def test_errors_name_the_bad_argument() -> None:
    case = make()
    base = {"image": case.image, "text": case.text, "logit_scale": 5.0, **case.keys()}
    for message, change in {
        r"image_teacher: expected shape \[5, 4\], got \[4, 4\]": {"image_teacher": case.image_teacher[1:]},
        r"text_teacher: expected float32 or": {"text_teacher": case.text_teacher.long()},
        r"image_queue: expected shape \[K, 4\], got \[4, 7\]": {"image_queue": case.image_queue.T},
        r"text_queue: expected shape \[7, 4\], got \[6, 4\]": {"text_queue": case.text_queue[1:]},
        r"image_queue, text_queue: expected both or neither": {"text_queue": None},
        r"queue_ids: expected ids and queues beside it, got ids None": {"queue_ids": case.queue_ids},
        r"queue_ids: expected shape \[7\], got \[6\]": {"ids": case.ids, "queue_ids": case.queue_ids[1:]},
        r"alpha: expected a float or a 0-dim tensor": {"alpha": torch.ones(1)},
        r"alpha: expected 0 to 1, got 1.5": {"alpha": 1.5},
        r"image_queue: expected device cpu, got meta": {"image_queue": case.image_queue.to("meta")},
    }.items():
        with pytest.raises(ValueError, match=message):
            ops.momentum_contrastive_loss(**{**base, **change})
    with pytest.raises(ValueError, match="queue_size: expected at least 0, got -1"):
        ops.MomentumContrastiveLoss(4, -1)
