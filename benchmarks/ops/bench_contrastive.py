"""focal_contrastive_loss forward and backward, against the reference and, for gamma 0, the losses of other packages."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import DEVICE, Bench, Run
from softmask import ops, reference

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of image, text and logit_scale


def open_clip() -> Loss:
    from open_clip.loss import ClipLoss

    return ClipLoss()


def cut_cross_entropy() -> Loss:
    """On the CPU by its torch.compile implementation."""
    from cut_cross_entropy import linear_cross_entropy

    one_side = partial(linear_cross_entropy, impl="cce" if DEVICE == "cuda" else "torch_compile")

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        label = torch.arange(len(image))
        return 0.5 * (one_side(scale * image, text, label) + one_side(scale * text, image, label))

    return loss


def metric_learning() -> Loss:
    from pytorch_metric_learning.distances import DotProductSimilarity
    from pytorch_metric_learning.losses import NTXentLoss

    one_side = NTXentLoss(temperature=1.0, distance=DotProductSimilarity(normalize_embeddings=False))

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        label, same = torch.arange(len(image)), torch.arange(len(image))  # the same tensor twice would mean one batch
        one = one_side(scale * image, label, ref_emb=text, ref_labels=same)
        return 0.5 * (one + one_side(scale * text, label, ref_emb=image, ref_labels=same))

    return loss


def inf_cl() -> Loss:
    from inf_cl import cal_flash_loss

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return 0.5 * (cal_flash_loss(image, text, scale=scale) + cal_flash_loss(text, image, scale=scale)).mean()

    return loss


def liger_kernel() -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    linear = LigerFusedLinearCrossEntropyLoss()

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        label = torch.arange(len(image))
        return 0.5 * (linear(text, scale * image, label) + linear(image, scale * text, label))

    return loss


def memeff() -> Loss:
    from memeff import MemoryEfficientCLIPLoss

    symmetric = MemoryEfficientCLIPLoss(1.0, normalized_inputs=True)
    return lambda image, text, scale: symmetric(scale * image, text)


PEERS: dict[str, Callable[[], Loss]] = {
    "open_clip": open_clip,
    "cut-cross-entropy": cut_cross_entropy,
    "pytorch-metric-learning": metric_learning,
    "inf-cl": inf_cl,
    "liger-kernel": liger_kernel,
    "memeff": memeff,
}
"""The losses of other packages. Only open_clip's takes a logit_scale; for the others, it multiplies the rows."""


@cache
def peer(name: str) -> Loss:
    """A package's loss, imported when it is first called, so that a missing package ends its own row alone."""
    return PEERS[name]()


def make(size: int, width: int, *, gamma: float, baselines: tuple[str, ...]) -> Bench:
    torch.manual_seed(0)
    image, text = (F.normalize(rows, dim=-1).requires_grad_() for rows in torch.randn(2, size, width))
    scale = torch.tensor(1 / 0.07, requires_grad=True)
    leaves = (image, text, scale)
    compiled = torch.compile(reference.focal_contrastive_loss, dynamic=False)

    def by_peer(name: str) -> Tensor:
        return peer(name)(image, text, scale)

    known: dict[str, Callable[[], Tensor]] = {
        "reference": lambda: reference.focal_contrastive_loss(image, text, scale, gamma=gamma),
        "compiled reference": lambda: compiled(image, text, scale, gamma=gamma),
    }
    known |= {name: partial(by_peer, name) for name in PEERS}
    block, keys = image.detach()[:512], text.detach().T
    return Bench(
        ours=Run(lambda: ops.focal_contrastive_loss(image, text, scale, gamma=gamma), leaves),
        baselines={name: Run(known[name], leaves) for name in baselines},
        floor=lambda: [block @ keys for _ in range(max(1, size // 512))],
        floor_name="4 products",
        floor_times=4.0,
    )


OWN = ("reference", "compiled reference")
OTHERS = ("open_clip", "cut-cross-entropy", *(("inf-cl", "liger-kernel", "memeff") if DEVICE == "cuda" else ()))
CUBIC = "pytorch-metric-learning"  # memory grows with N ** 3: 64 GiB at N 4096
CASES = {
    "N4096 D256 gamma 0": partial(make, 4096, 256, gamma=0.0, baselines=(*OWN, *OTHERS)),
    "N4096 D256 gamma 2": partial(make, 4096, 256, gamma=2.0, baselines=OWN),
    "N16384 D256 gamma 2": partial(make, 16384, 256, gamma=2.0, baselines=("reference",)),
    "N256 D256 gamma 0": partial(make, 256, 256, gamma=0.0, baselines=(*OWN, *OTHERS, CUBIC)),
    "N64 D256 gamma 2": partial(make, 64, 256, gamma=2.0, baselines=OWN),
}
SMALL = {"N8 D8 gamma 0": partial(make, 8, 8, gamma=0.0, baselines=("reference", *PEERS))}


@pytest.mark.parametrize("size", CASES)
def test_contrastive(bench, size: str) -> None:
    bench("focal_contrastive_loss", size, CASES[size])
