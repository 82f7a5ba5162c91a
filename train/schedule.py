"""What changes with the step number alone: learning rate, alpha, random state. Nothing here needs to be saved."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from softmask.train.config import OptimizerConfig


def lr_factor(step: int, config: OptimizerConfig, *, steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `steps`, as a multiple of `config.lr`.

    Warm-up: (step + 1) / warmup_steps. Then, with m = min_lr / lr and t from 0 to 1 at the last step,
    m + (1 - m) * (1 + cos(pi * t)) / 2.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = min((step - config.warmup_steps) / max(steps - 1 - config.warmup_steps, 1), 1.0)
    floor = config.min_lr / config.lr
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def scheduler_factory(config: OptimizerConfig, *, steps: int) -> Callable[[torch.optim.Optimizer], LambdaLR]:
    """The callable that DeepSpeed makes the scheduler of."""
    return lambda optimizer: LambdaLR(optimizer, lambda step: lr_factor(step, config, steps=steps))


def alpha_at(step: int, *, alpha: float, warmup_steps: int) -> float:
    """Weight of the momentum model's targets: linear from 0 to `alpha` over the first `warmup_steps` steps."""
    return alpha * min(step / warmup_steps, 1.0) if warmup_steps else alpha


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: matrices and kernels with weight decay, all others without."""
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in trainable if parameter.ndim >= 2 and not name.endswith("bias")]
    chosen = {id(parameter) for parameter in decayed}
    plain = [parameter for _, parameter in trainable if id(parameter) not in chosen]
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "decayed": True},
        {"params": plain, "weight_decay": 0.0, "decayed": False},
    ]
    return [group for group in groups if group["params"]]


def seed_everything(seed: int, micro_batch: int, rank: int) -> None:
    """Random state of one micro-step, a function of (seed, micro_batch, rank): a resumed run draws the same numbers."""
    state = np.random.SeedSequence([seed, micro_batch, rank]).generate_state(4, np.uint32)
    torch.manual_seed(int(state[0]) << 32 | int(state[1]))
    random.seed(int(state[2]))
    np.random.seed(int(state[3]))
