"""focal_contrastive_loss against its formula in Python floats, F.cross_entropy, gradcheck, and two processes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from softmask import ops
from softmask.ops import _distributed
from tests.support.two_ranks import average_gradients, own_half, run_on_two_ranks

pytestmark = pytest.mark.usefixtures("each_backend")

GAMMAS = [0.0, 0.5, 1.0, 2.0]


def make(batch: int = 6, width: int = 5, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, batch, width, generator=generator, dtype=torch.float64)
    image, text = F.normalize(rows, dim=-1)
    return image, text, torch.tensor(7.0, dtype=torch.float64)


def by_hand(image: Tensor, text: Tensor, scale: float, gamma: float, ids: list[int] | None) -> list[float]:
    """Per sample, in Python's floats."""
    ids = ids or list(range(len(image)))

    def side(rows: Tensor, columns: Tensor) -> list[float]:
        losses = []
        for i, logits in enumerate((scale * rows @ columns.T).tolist()):
            total = sum(math.exp(z - max(logits)) for z in logits)
            positives = [j for j, other in enumerate(ids) if other == ids[i]]
            loss = 0.0
            for j in positives:
                p = math.exp(logits[j] - max(logits)) / total
                loss -= (1 - p) ** gamma * math.log(p) / len(positives)
            losses.append(loss)
        return losses

    return [(a + b) / 2 for a, b in zip(side(image, text), side(text, image), strict=True)]


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("ids", [None, [3, 1, 3, 0, 3, 1], [5] * 6])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_equals_formula(gamma: float, ids: list[int] | None, as_tensor: bool) -> None:
    image, text, scale = make()
    expected = torch.tensor(by_hand(image, text, 7.0, gamma, ids), dtype=torch.float64)
    options = {"gamma": torch.tensor(gamma) if as_tensor else gamma, "ids": None if ids is None else torch.tensor(ids)}
    scale = scale if as_tensor else 7.0
    for reduction, reduced in {"none": expected, "mean": expected.mean(), "sum": expected.sum()}.items():
        loss = ops.focal_contrastive_loss(image, text, scale, reduction=reduction, **options)
        torch.testing.assert_close(loss, reduced)


@pytest.mark.parametrize("batch", [1, 7, 63, 130, 257])
def test_gamma_zero_equals_cross_entropy(batch: int) -> None:
    image, text, scale = (tensor.requires_grad_() for tensor in make(batch))
    label = torch.arange(batch)
    logits = scale * image @ text.T
    expected = (F.cross_entropy(logits, label) + F.cross_entropy(logits.T, label)) / 2
    loss = ops.focal_contrastive_loss(image, text, scale)
    torch.testing.assert_close(loss, expected)
    leaves = (image, text, scale)
    for got, want in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(gamma: float, reduction: str) -> None:
    leaves = tuple(tensor.requires_grad_() for tensor in make(4, 3))
    ids = torch.tensor([0, 1, 0, 2])
    for given in (None, ids):
        assert torch.autograd.gradcheck(
            lambda i, t, s, given=given: ops.focal_contrastive_loss(
                i, t, s, gamma=gamma, ids=given, reduction=reduction
            ),
            leaves,
        )


def test_weights_after_reduction_none() -> None:
    """Per-sample weights of the unreduced loss reach the gradient."""
    image, text, scale = make()
    weight = torch.linspace(0, 2, 6, dtype=torch.float64)
    image.requires_grad_()
    (got,) = torch.autograd.grad(
        (ops.focal_contrastive_loss(image, text, scale, gamma=2.0, reduction="none") * weight).sum(), image
    )
    rows = [
        torch.autograd.grad(ops.focal_contrastive_loss(image, text, scale, gamma=2.0, reduction="none")[i], image)[0]
        for i in range(6)
    ]
    torch.testing.assert_close(got, sum(w * row for w, row in zip(weight, rows, strict=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_certain_predictions_have_zero_loss_and_gradient(dtype: torch.dtype, gamma: float) -> None:
    """At p = 1 the loss must not be negative nor the gradient NaN, also for gamma in (0, 1)."""
    for eye in (torch.eye(1, dtype=dtype), torch.eye(4, dtype=dtype)):
        image, text = eye.clone().requires_grad_(), eye.clone().requires_grad_()
        scale = torch.tensor(1000.0, dtype=dtype, requires_grad=True)
        loss = ops.focal_contrastive_loss(image, text, scale, gamma=gamma)
        assert loss.item() == 0.0
        for gradient in torch.autograd.grad(loss, (image, text, scale)):
            assert not gradient.any() and gradient.isfinite().all()


@pytest.mark.parametrize("gamma", GAMMAS)
def test_logit_scale_100_and_ties(gamma: float) -> None:
    image, text, _ = make(130, 16)
    image, text = image.float().requires_grad_(), text.float().requires_grad_()
    for other in (text, image):  # random pairs: far from certain; the same features: nearly certain
        loss = ops.focal_contrastive_loss(image, other, 100.0, gamma=gamma, reduction="none")
        assert loss.isfinite().all() and (loss >= 0).all()
        assert torch.autograd.grad(loss.sum(), image)[0].isfinite().all()
    same = image[:1].expand(7, -1)  # every logit ties: p = 1/7
    tied = ops.focal_contrastive_loss(same, same, 100.0, gamma=gamma)
    assert tied.item() == pytest.approx((6 / 7) ** gamma * math.log(7), rel=1e-5)


def test_empty_batch() -> None:
    image, text, scale = (tensor.requires_grad_() for tensor in make(0))
    for reduction in ("mean", "sum"):
        loss = ops.focal_contrastive_loss(image, text, scale, gamma=2.0, reduction=reduction)
        assert loss.item() == 0.0
        assert torch.autograd.grad(loss, scale)[0].item() == 0.0
    assert ops.focal_contrastive_loss(image, text, scale, reduction="none").shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_accumulates_in_fp32(dtype: torch.dtype) -> None:
    image, text = (tensor.to(dtype) for tensor in make()[:2])
    expected = ops.focal_contrastive_loss(image.float(), text.float(), 20.0, gamma=1.0)
    assert expected.dtype == torch.float32
    assert torch.equal(ops.focal_contrastive_loss(image, text, 20.0, gamma=1.0), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.focal_contrastive_loss(image, text, 20.0, gamma=1.0), expected)
    strided = image.T.contiguous().T
    assert not strided.is_contiguous()
    torch.testing.assert_close(ops.focal_contrastive_loss(strided, text, 20.0, gamma=1.0), expected)


def test_compile_without_recompiling() -> None:
    """gamma and logit_scale as tensors change during training: one graph serves all their values."""
    image, text, _ = make()
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import, and the two ranks import this file

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ops.focal_contrastive_loss, fullgraph=True, backend=counter)
    for value in (0.0, 0.7, 2.0):
        leaves = [image.clone().requires_grad_(), torch.tensor(5.0 + value, requires_grad=True)]
        losses = [
            function(leaves[0], text, leaves[1], gamma=torch.tensor(value), ids=torch.tensor([0, 1, 2, 0, 4, 5]))
            for function in (compiled, ops.focal_contrastive_loss)
        ]
        torch.testing.assert_close(*losses)
        for got, want in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
            torch.testing.assert_close(got, want)
    assert counter.frame_count == 1


def test_module() -> None:
    image, text, scale = make()
    ids = torch.tensor([0, 1, 2, 0, 4, 5])
    loss = ops.FocalContrastiveLoss(gamma=2.0, reduction="sum")(image, text, scale, ids=ids)
    assert torch.equal(loss, ops.focal_contrastive_loss(image, text, scale, gamma=2.0, ids=ids, reduction="sum"))


def global_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs [8, 4] of both sides, ids, and the weight that makes features of them."""
    generator = torch.Generator().manual_seed(3)
    image, text = torch.randn(2, 8, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    return image, text, torch.tensor([0, 1, 2, 3, 0, 5, 1, 0]), weight


def loss_and_parameters(image: Tensor, text: Tensor, ids: Tensor | None, weight: Tensor, group=None):
    parameters = [weight.clone().requires_grad_(), torch.tensor(6.0, dtype=torch.float64, requires_grad=True)]
    features = [F.normalize(side @ parameters[0], dim=-1) for side in (image, text)]
    return ops.focal_contrastive_loss(*features, parameters[1], gamma=2.0, ids=ids, group=group), parameters


def on_rank(rank: int) -> list[list[Tensor]]:
    image, text, ids, weight = global_batch()
    outcomes = []
    for given in (None, own_half(ids, rank)):
        halves = (own_half(image, rank), own_half(text, rank))
        loss, parameters = loss_and_parameters(*halves, given, weight, dist.group.WORLD)
        loss.backward()
        outcomes.append([loss.detach(), *average_gradients(parameters)])
    return outcomes


def test_two_processes_equal_one(tmp_path: Path) -> None:
    ranks = run_on_two_ranks(on_rank, tmp_path)
    image, text, ids, weight = global_batch()
    for case, given in enumerate((None, ids)):
        loss, parameters = loss_and_parameters(image, text, given, weight)
        loss.backward()
        torch.testing.assert_close((ranks[0][case][0] + ranks[1][case][0]) / 2, loss.detach())
        for rank in ranks:
            for got, parameter in zip(rank[case][1:], parameters, strict=True):
                torch.testing.assert_close(got, parameter.grad)


def test_half_precision_gradients_are_summed_over_ranks_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four other ranks add a quarter of bf16's rounding unit each, which sums in bf16 would lose."""

    def add_others(total: Tensor, group: object) -> None:
        for _ in range(4):
            total += 2.0**-9

    monkeypatch.setattr(dist, "all_reduce", add_others)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "get_rank", lambda group: 1)
    monkeypatch.setattr(_distributed, "gather_rows_no_grad", lambda rows, group: torch.cat([rows, rows]))
    rows = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
    _distributed.gather_rows(rows, None).backward(torch.ones(4, 3, dtype=torch.bfloat16))
    assert torch.equal(rows.grad, torch.full((2, 3), 1 + 2.0**-7, dtype=torch.bfloat16))


def test_errors_name_the_bad_argument() -> None:
    image, text, scale = make()
    loss = ops.focal_contrastive_loss
    for message, call in {
        r"image: expected shape \[B, D\], got \[6\]": lambda: loss(image[:, 0], text, scale),
        r"text: expected shape \[6, 5\], got \[5, 5\]": lambda: loss(image, text[1:], scale),
        r"text: expected float32 or .*, got torch.int64": lambda: loss(image, text.long(), scale),
        r"logit_scale: expected a float or a tensor of one element, got shape \[2\]": lambda: loss(
            image, text, scale.expand(2)
        ),
        r"gamma: expected at least 0.0, got -1.0": lambda: loss(image, text, scale, gamma=-1.0),
        r"ids: expected shape \[6\], got \[5\]": lambda: loss(image, text, scale, ids=torch.arange(5)),
        r"ids: expected int64, got torch.float32": lambda: loss(image, text, scale, ids=torch.rand(6)),
        r"text: expected device cpu, got meta": lambda: loss(image, text.to("meta"), scale),
        r"reduction: expected one of .*, got 'max'": lambda: loss(image, text, scale, reduction="max"),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
