"""Learning rate and random state as functions of the step, and the optimizer's parameter groups. Nothing is saved."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from softmask.training.config import ConfigError, OptimizerConfig

VIT_PART = re.compile(
    r"backbone\.vision\.vit\.(?:blocks\.(\d+)\.|patch_embed\.|pos_embed|cls_token|reg_token|norm_pre\.)"
)


def lr_factor(step: int, config: OptimizerConfig, *, steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `steps`, as a multiple of `config.lr`.

    Warm-up: (step + 1) / warmup_steps. After it, with m = min_lr / lr and t rising from 0 to 1 at the last step:
    m + (1 - m) * (1 + cos(pi * t)) / 2.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = min((step - config.warmup_steps) / max(steps - 1 - config.warmup_steps, 1), 1.0)
    floor = config.min_lr / config.lr
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def scheduler_factory(config: OptimizerConfig, *, steps: int) -> Callable[[torch.optim.Optimizer], LambdaLR]:
    """The callable from which DeepSpeed makes the scheduler."""
    return lambda optimizer: LambdaLR(optimizer, lambda step: lr_factor(step, config, steps=steps))


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups of the trainable parameters by `lr_scale`, `vision_layer_decay` included, and weight decay.

    Matrices and kernels decay. Biases, norms and other vectors do not, nor do parameters that modules name in
    `no_weight_decay`, as timm's modules do: position embeddings and class tokens.

    Raises:
        ConfigError: no parameter's name starts with a key of `config.lr_scales`.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for part in config.lr_scales:
        if not any(_starts_with(name, part) for name in trained):
            known = sorted({".".join(name.split(".")[:2]) for name in trained})
            raise ConfigError(
                f"optimizer.lr_scales: no trained parameter's name starts with {part!r}; known: {', '.join(known)}"
            )
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    layers_above = vision_layers_above(trained) if config.vision_layer_decay < 1 else {}
    spared = _spared(model)
    for name, parameter in trained.items():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # at ZeRO stage 3 the parameter itself is empty
        scale = _lr_scale(name, config.lr_scales) * config.vision_layer_decay ** layers_above.get(name, 0)
        decayed = len(shape) >= 2 and not name.endswith("bias") and name not in spared
        group: dict[str, Any] = {"params": [], **group_options(config, lr_scale=scale, decayed=decayed)}
        groups.setdefault((scale, decayed), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups, reverse=True)]


def groups_digest(
    model: nn.Module, config: OptimizerConfig, *, name_of: Callable[[str], str] = lambda name: name
) -> str:
    """Digest of the parameters in each group. The optimizer's state fits only equal groups. `name_of` renames them."""
    names = {id(parameter): name_of(name) for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, config)
    text = [[group["lr_scale"], group["decayed"], [names[id(p)] for p in group["params"]]] for group in groups]
    return hashlib.sha256(json.dumps(text).encode()).hexdigest()


def _spared(model: nn.Module) -> set[str]:
    """Names of the parameters that modules exempt from weight decay."""
    asking = ((prefix, getattr(module, "no_weight_decay", None)) for prefix, module in model.named_modules())
    return {f"{prefix}.{name}".lstrip(".") for prefix, names in asking if callable(names) for name in names()}


def group_options(config: OptimizerConfig, *, lr_scale: float, decayed: bool) -> dict[str, float | bool]:
    """Options of a parameter group: its two characteristics, and the peak learning rate and weight decay they imply."""
    decay = config.weight_decay if decayed else 0.0
    return {"lr_scale": lr_scale, "decayed": decayed, "lr": config.lr * lr_scale, "weight_decay": decay}


def vision_layers_above(names: Iterable[str]) -> dict[str, int]:
    """Parameter of a ViT's blocks or of what comes before them -> the number of layers above it, the task's head
    included. With L blocks the last has 1, the first L, and the embedding of patches, positions and CLS L + 1."""
    found = {name: match for name in names if (match := VIT_PART.match(name))}
    blocks = {name: int(match[1]) for name, match in found.items() if match[1]}
    count = max(blocks.values(), default=-1) + 1
    return {name: count - blocks[name] if name in blocks else count + 1 for name in found}


def _lr_scale(name: str, scales: dict[str, float]) -> float:
    """The factor of the longest key that `name` starts with, or 1."""
    return scales.get(max((part for part in scales if _starts_with(name, part)), key=len, default=""), 1.0)


def _starts_with(name: str, part: str) -> bool:
    return f"{name}.".startswith(f"{part}.")


def seed_everything(seed: int, micro_batch: int, rank: int) -> None:
    """Set the random state of a micro-step from (seed, micro_batch, rank), also in a resumed run."""
    state = np.random.SeedSequence([seed, micro_batch, rank]).generate_state(4, np.uint32)
    torch.manual_seed(int(state[0]) << 32 | int(state[1]))
    random.seed(int(state[2]))
    np.random.seed(int(state[3]))
