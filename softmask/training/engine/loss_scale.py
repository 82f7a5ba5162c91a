"""Loss scale, check and clipping of gradients, the same at every ZeRO stage and precision."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class GuardedOptimizer(Protocol):
    """An optimizer with the flag that DeepSpeed's engine reads after a step."""

    param_groups: list[dict[str, Any]]
    overflow: bool

    def step(self) -> Any: ...


class GradientGuard:
    """Dynamic loss scale for fp16 and, at every precision, no step on gradients that are not finite.

    DeepSpeed 0.19's own scaling under torch_autocast clips scaled gradients by the unscaled norm, updates the scale
    once per parameter group, and neither lowers it after a skipped step nor saves it. Its clipping at stage 0 fails on
    parameters without dimensions. Here a step has one scale. ZeRO 1 to 3 divide by it, clip and skip steps themselves
    (`override_loss_scale`); at stage 0 the engine calls this object as its gradient scaler.
    """

    def __init__(self, *, dynamic: bool, clip_grad: float = 0.0, growth_interval: int = 2000) -> None:
        self.dynamic = dynamic
        self.clip_grad = clip_grad
        self.growth_interval = growth_interval
        self.value = 65536.0 if dynamic else 1.0
        self.good_steps = 0

    def attach(self, engine: Any) -> None:
        if engine.zero_optimization():
            engine.optimizer.torch_autocast_gradscaler = None
        else:
            engine.torch_autocast_z0_gradscaler = self
        self._engine = engine
        self._publish()

    def _publish(self) -> None:
        if self._engine.zero_optimization():
            self._engine.optimizer.override_loss_scale(self.value)

    def after_step(self) -> bool:
        """Adjust the scale after an optimizer step. Returns False if the step was skipped for its gradients."""
        finite = not self._engine.optimizer.overflow
        if self.dynamic:
            self.good_steps = self.good_steps + 1 if finite else 0
            if not finite:
                self.value /= 2
            elif self.good_steps % self.growth_interval == 0:
                self.value *= 2
            self._publish()
        return finite

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.good_steps = state["value"], state["good_steps"]
        self._publish()

    # -- called by the engine at ZeRO stage 0 ----------------------------------------------------------------------

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self.value if self.dynamic else loss

    @torch.no_grad()
    def step(self, optimizer: GuardedOptimizer) -> None:
        """Unscale, clip, and step unless a gradient is not finite. All ranks hold the same, reduced gradients."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        grads = [parameter.grad for parameter in parameters]
        if self.dynamic:
            torch._foreach_div_(grads, self.value)
        if self.clip_grad:
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip_grad)
        else:
            norm = torch.stack(torch._foreach_norm(grads))
        optimizer.overflow = not bool(norm.isfinite().all())  # then the engine does not advance the schedule
        if not optimizer.overflow:
            optimizer.step()

    def update(self) -> None:
        """Do nothing: `after_step` adjusts the scale, at every stage."""
