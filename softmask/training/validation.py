"""When a run measures itself on held-out data, which checkpoint was best, and when to stop early."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from softmask.data import CaptionTokenizer
from softmask.tasks.downstream import DownstreamTask
from softmask.training.checkpoint.store import build_model, without_files
from softmask.training.engine.zero import AUTOCAST, gathered

if TYPE_CHECKING:
    from softmask.training.config import Config


class Validate(Protocol):
    """Measures models on held-out data."""

    def check(self, tokenizer: CaptionTokenizer) -> None:
        """Refuse options that do not fit the tokenizer. Raises ConfigError."""

    def __call__(self, model: nn.Module, tokenizer: CaptionTokenizer, device: torch.device) -> dict[str, Any]:
        """The task's section of metrics.json. All ranks call it together."""


@dataclass
class Measured:
    """One validation."""

    metric: str
    score: float
    is_best: bool


class Validation:
    """The validations of a run.

    Attributes:
        best_step: the step of the best score so far; 0: there is none.
    """

    def __init__(self, validate: Validate | None, config: Config, *, batches_per_epoch: int) -> None:
        self._validate, self._config, options = validate, config, config.train
        name = AUTOCAST.get(options.precision)
        self._autocast: torch.dtype | None = getattr(torch, name) if name else None
        steps_per_epoch = max(1, round(batches_per_epoch / options.accumulation))
        self._every, self._patience = options.validate_every or steps_per_epoch, options.patience
        self._task = config.find_task()
        self.best_step, self._best_score, self._without_gain = 0, 0.0, 0

    def is_due(self, step: int, *, last: bool) -> bool:
        return self._validate is not None and (last or step % self._every == 0)

    @property
    def gave_up(self) -> bool:
        """Whether as many validations in a row as `train.patience` brought no better score."""
        return 0 < self._patience <= self._without_gain

    def measure(self, engine: Any, tokenizer: CaptionTokenizer, *, step: int) -> Measured:
        """Measure the engine's model, which is left in evaluation mode, in the precision of training."""
        assert self._validate is not None and isinstance(self._task, DownstreamTask)
        engine.eval()
        model = whole_model(engine, self._config, tokenizer)
        with torch.autocast(engine.device.type, self._autocast, enabled=self._autocast is not None):
            score = self._task.score(self._validate(model, tokenizer, engine.device))
        score = _of_first_rank(-math.inf if math.isnan(score) else score)
        is_best = not self.best_step or score > self._best_score
        if is_best:
            self.best_step, self._best_score, self._without_gain = step, score, 0
        else:
            self._without_gain += 1
        return Measured(self._task.metric, score, is_best)

    def state_dict(self) -> dict[str, Any]:
        """The entry of trainer.json, empty before the first validation."""
        if not self.best_step:
            return {}
        state = {"best_step": self.best_step, "best_score": self._best_score, "without_gain": self._without_gain}
        return {"validation": state}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            self.best_step, self._best_score = state["best_step"], state["best_score"]
            self._without_gain = state["without_gain"]


def whole_model(engine: Any, config: Config, tokenizer: CaptionTokenizer) -> nn.Module:
    """The engine's model; at ZeRO stage 3 on several ranks a copy with whole parameters, since they measure different
    numbers of batches, and would wait for each other's parameters."""
    if config.zero_stage < 3 or dist.get_world_size() == 1:
        return engine.module
    with torch.random.fork_rng(devices=[]):
        copy = build_model(without_files(config), tokenizer).to(engine.device).eval()
    with torch.no_grad():
        for name, tensor in gathered(engine.module):
            copy.get_parameter(name).copy_(tensor)
        for name, tensor in engine.module.named_buffers():
            copy.get_buffer(name).copy_(tensor)
    return copy


def _of_first_rank(score: float) -> float:
    """Rank 0's score: ranks must agree on which is the best."""
    shared = [score]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(shared)
    return shared[0]
