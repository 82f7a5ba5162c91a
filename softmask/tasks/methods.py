"""The published methods that can be trained: what of a configuration, a model and a step is their own."""

from __future__ import annotations

from typing import Any

from torch import nn

from softmask.models import SoftMaskPP, SoftMaskPPConfig, SpecialIds, SyCoCa, SyCoCaConfig

MODELS = {SoftMaskPPConfig: SoftMaskPP, SyCoCaConfig: SyCoCa}


def build(config: SoftMaskPPConfig | SyCoCaConfig, special_ids: SpecialIds) -> nn.Module:
    """A model with what the trainer calls: forward(batch, **step_options) with the output's loss and terms,
    update_momentum, enqueue, statistics, set_activation_checkpointing."""
    return MODELS[type(config)](config, special_ids=special_ids)


def alpha_at(step: int, *, alpha: float, warmup_steps: float) -> float:
    """Weight of the momentum model's targets: linear from 0 to `alpha` over the first `warmup_steps` steps."""
    return alpha * min(step / warmup_steps, 1.0) if warmup_steps else alpha


def step_options(config: SoftMaskPPConfig | SyCoCaConfig, step: int, *, steps_per_epoch: float) -> dict[str, Any]:
    """What of a forward pass follows from the number of the optimizer step."""
    if isinstance(config, SyCoCaConfig):
        return {}
    warmup_steps = config.alpha_warmup_steps or config.alpha_warmup_epochs * steps_per_epoch
    alpha = alpha_at(step, alpha=config.alpha, warmup_steps=warmup_steps)
    return {"alpha": alpha, "fuse": step >= config.contrast_steps}
