"""The interface between the trainer and the model of a task (softmask/tasks/base.py)."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class StepOutput(Protocol):
    """Output of a forward pass: the loss and its detached terms by name, all without dimensions."""

    loss: Tensor
    terms: dict[str, Tensor]


class TrainedModel(Protocol):
    """What the trainer calls on a model, which is also an `nn.Module`."""

    def update_momentum(self) -> None:
        """Update the momentum encoder; called before the forward passes of an optimizer step."""

    def enqueue(self, output: Any) -> None:
        """Put the features of a forward pass into the queue; called after its backward pass."""

    def statistics(self) -> list[Tensor]:
        """Buffers that a forward pass changes. The trainer restores them if it skips the step."""

    def set_activation_checkpointing(self, enable: bool) -> None:
        """Whether the backward pass recomputes activations."""
