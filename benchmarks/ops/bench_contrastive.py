"""focal_contrastive_loss forward and backward, against the reference and, for gamma 0, the losses of other packages."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import DEVICE, Bench, Run
from softmask import ops, reference


def peers() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The losses of other packages, as functions of (image, text, logit_scale). Only open_clip's takes a logit_scale;
    for the others, it multiplies the rows. On the CPU, cut-cross-entropy uses its torch.compile implementation."""
    from cut_cross_entropy import linear_cross_entropy
    from open_clip.loss import ClipLoss
    from pytorch_metric_learning.distances import DotProductSimilarity
    from pytorch_metric_learning.losses import NTXentLoss

    clip, impl = ClipLoss(), "cce" if DEVICE == "cuda" else "torch_compile"

    def cut(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        label = torch.arange(len(image))
        one = linear_cross_entropy(scale * image, text, label, impl=impl)
        return 0.5 * (one + linear_cross_entropy(scale * text, image, label, impl=impl))

    def metric(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        label, same = torch.arange(len(image)), torch.arange(len(image))  # the same tensor twice would mean one batch
        loss = NTXentLoss(temperature=1.0, distance=DotProductSimilarity(normalize_embeddings=False))
        one = loss(scale * image, label, ref_emb=text, ref_labels=same)
        return 0.5 * (one + loss(scale * text, label, ref_emb=image, ref_labels=same))

    known = {"open_clip": clip, "cut-cross-entropy": cut, "pytorch-metric-learning": metric}
    return known | gpu_peers() if DEVICE == "cuda" else known


def gpu_peers() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The losses of packages whose kernels need a GPU."""
    from inf_cl import cal_flash_loss
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    from memeff import MemoryEfficientCLIPLoss

    linear, symmetric = LigerFusedLinearCrossEntropyLoss(), MemoryEfficientCLIPLoss(1.0, normalized_inputs=True)

    def inf(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return 0.5 * (cal_flash_loss(image, text, scale=scale) + cal_flash_loss(text, image, scale=scale)).mean()

    def liger(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        label = torch.arange(len(image))
        return 0.5 * (linear(text, scale * image, label) + linear(image, scale * text, label))

    def memeff(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return symmetric(scale * image, text)

    return {"inf-cl": inf, "liger-kernel": liger, "memeff": memeff}


def make(size: int, width: int, *, gamma: float, baselines: tuple[str, ...]) -> Bench:
    torch.manual_seed(0)
    image, text = (F.normalize(rows, dim=-1).requires_grad_() for rows in torch.randn(2, size, width))
    scale = torch.tensor(1 / 0.07, requires_grad=True)
    leaves = (image, text, scale)
    compiled = torch.compile(reference.focal_contrastive_loss, dynamic=False)
    known: dict[str, Callable[[], Tensor]] = {
        "reference": lambda: reference.focal_contrastive_loss(image, text, scale, gamma=gamma),
        "compiled reference": lambda: compiled(image, text, scale, gamma=gamma),
    }
    if set(baselines) - set(known):
        known |= {name: partial(loss, image, text, scale) for name, loss in peers().items()}
    block, keys = image.detach()[:512], text.detach().T
    return Bench(
        ours=Run(lambda: ops.focal_contrastive_loss(image, text, scale, gamma=gamma), leaves),
        baselines={name: Run(known[name], leaves) for name in baselines},
        floor=lambda: [block @ keys for _ in range(max(1, size // 512))],
        floor_name="4 products",
        floor_times=4.0,
    )


OWN = ("reference", "compiled reference")
PEERS = ("open_clip", "cut-cross-entropy") + (("inf-cl", "liger-kernel", "memeff") if DEVICE == "cuda" else ())
CUBIC = "pytorch-metric-learning"  # memory grows with N ** 3: 64 GiB at N 4096
CASES = {
    "N4096 D256 gamma 0": partial(make, 4096, 256, gamma=0.0, baselines=(*OWN, *PEERS)),
    "N4096 D256 gamma 2": partial(make, 4096, 256, gamma=2.0, baselines=OWN),
    "N16384 D256 gamma 2": partial(make, 16384, 256, gamma=2.0, baselines=("reference",)),
    "N256 D256 gamma 0": partial(make, 256, 256, gamma=0.0, baselines=(*OWN, *PEERS, CUBIC)),
    "N64 D256 gamma 2": partial(make, 64, 256, gamma=2.0, baselines=OWN),
}


@pytest.mark.parametrize("size", CASES)
def test_contrastive(bench, size: str) -> None:
    bench("focal_contrastive_loss", size, CASES[size])
