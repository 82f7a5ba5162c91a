"""Logistic regression on frozen features, as CLIP_benchmark has it: AdamW at 0.1 with a cosine, 10 epochs of batches of
64, and the weight decay of a grid that does best on validation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DECAYS = tuple(10.0**power for power in range(-6, 3))
LEARNING_RATE, EPOCHS, BATCH = 0.1, 10, 64


@dataclass(frozen=True)
class Labeled:
    """Normalized features [N, d] and their classes [N] int64."""

    features: Tensor
    labels: Tensor

    def split(self, share: float, *, seed: int) -> tuple[Labeled, Labeled]:
        """All but a random share, and this share, at least one of each."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        count = min(max(round(share * len(order)), 1), len(order) - 1)
        held, rest = order[:count], order[count:]
        return Labeled(self.features[rest], self.labels[rest]), Labeled(self.features[held], self.labels[held])


@dataclass(frozen=True)
class Probe:
    """The chosen classifier, its weight decay, and its accuracy on validation."""

    weight: Tensor  # [classes, d]
    bias: Tensor  # [classes]
    decay: float
    accuracy: float

    def logits(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)


def fit(train: Labeled, val: Labeled, *, classes: int, seed: int = 0) -> Probe:
    """The probe of `train` whose weight decay has the highest top-1 on `val`; of equal ones the largest decay."""
    best: Probe | None = None
    for decay in DECAYS:
        weight, bias = _fit(train, classes=classes, decay=decay, seed=seed)
        right = F.linear(val.features, weight, bias).argmax(1) == val.labels
        probe = Probe(weight, bias, decay, right.double().mean().item())
        best = probe if best is None or probe.accuracy >= best.accuracy else best
    assert best is not None
    return best


@torch.enable_grad()
def _fit(train: Labeled, *, classes: int, decay: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    layer = torch.nn.Linear(train.features.shape[1], classes, dtype=train.features.dtype)
    torch.nn.init.normal_(layer.weight, std=0.01, generator=generator)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=LEARNING_RATE, weight_decay=decay)
    steps = EPOCHS * math.ceil(len(train.labels) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(train.labels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(layer(train.features[rows]), train.labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return layer.weight.detach(), layer.bias.detach()
