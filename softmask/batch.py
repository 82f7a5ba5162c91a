"""A batch of captioned images: what the data gives and the models take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Batch:
    """B captioned images."""

    images: Tensor  # [B, 3, H, W] float32, normalized
    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] bool, True = real token
    word_ids: Tensor  # [B, T] int64, see TokenBatch
    image_id: Tensor  # [B] int64, equal for captions of the same image
    skipped: list[str] = field(default_factory=list)  # "shard.tar:key: reason" for each sample that was replaced
    num_tokens: int | None = None  # real tokens; None: counted when needed, which waits for a device

    def to(self, device: torch.device | str) -> Batch:
        """A copy on `device`; asynchronous from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory; DataLoader calls this."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {n: function(value) for n, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed)


@dataclass
class LabeledBatch(Batch):
    """B examples with a class each."""

    labels: Tensor | None = None  # [B] int64; None where there are none


@dataclass
class AnswerBatch(Batch):
    """B questions with A answers, each of one question."""

    answer_ids: Tensor | None = None  # [A, T] int64, from [CLS] to [SEP]
    answer_mask: Tensor | None = None  # [A, T] bool, True = real token
    answer_weight: Tensor | None = None  # [A] float32
    question: Tensor | None = None  # [A] int64, row of the answer's question
    num_answer_tokens: int | None = None
