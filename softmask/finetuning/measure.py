"""A task's own metric on held-out data during training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from softmask.data import CaptionTokenizer
from softmask.evaluation.captioning import CaptionOptions
from softmask.evaluation.readers import Reader, Scorer
from softmask.evaluation.sections import Evaluation, find_section
from softmask.tasks.downstream import DownstreamTask
from softmask.training.config import Config


def validator(config: Config) -> Callable[[nn.Module, CaptionTokenizer, torch.device], dict[str, Any]] | None:
    """The measurement of `data.val` for the trainer, None without such data. All ranks call it together.

    Raises:
        DataError: the data cannot be used.
    """
    task = config.find_task()
    assert isinstance(task, DownstreamTask)
    if not config.data.val:
        return None
    source, section = task.open(config.data.val, config.data, split="val"), find_section(task.section)
    rerank, beams = getattr(config.head, "rerank", None), getattr(config.head, "beams", None)
    options: dict[str, Any] = {} if rerank is None else {"rerank": rerank}
    options |= {} if beams is None else {"captions": CaptionOptions(beams=beams)}

    def measure(model: Any, tokenizer: CaptionTokenizer, device: torch.device) -> dict[str, Any]:
        scorer = Scorer(model, tokenizer, config, device=device)
        given = Evaluation(scorer=scorer, reader=Reader(source, config.data), pairs=0, **options)
        return section.run(given) or {}

    return measure
