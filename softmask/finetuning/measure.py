"""A task's own metric on held-out data during training."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch

from softmask.data import CaptionTokenizer, DataError
from softmask.data.loader import check_bad_share
from softmask.evaluation.captioning import WRITING, CaptionOptions, caption_limits
from softmask.evaluation.ranks import rank
from softmask.evaluation.readers import Reader, Scorer
from softmask.evaluation.sections import Evaluation, Section, find_section
from softmask.tasks.downstream import DownstreamTask
from softmask.training.config import Config

logger = logging.getLogger("softmask.data")


@dataclass
class HeldOut:
    """The measurement of `data.val`."""

    config: Config
    source: Any
    section: Section
    options: dict[str, Any]  # of Evaluation
    said: set[str] = field(default_factory=set)

    def check(self, tokenizer: CaptionTokenizer) -> None:
        if "captions" in self.options:
            caption_limits(self.config, tokenizer, self.options["captions"])

    def __call__(self, model: Any, tokenizer: CaptionTokenizer, device: torch.device) -> dict[str, Any]:
        config, source = self.config, self.source
        scorer = Scorer(model, tokenizer, config, device=device, batch_size=config.train.batch_size)
        reader = Reader(source, config.data)
        found = self.section.run(Evaluation(scorer=scorer, reader=reader, pairs=0, **self.options))
        if found is None:
            raise DataError(f"data.val: {', '.join(source.paths)} has nothing to measure {config.task} on")
        if skipped := list(reader.skipped.values()):
            check_bad_share(len(skipped), len(source), allowed=config.data.max_bad_share, names=skipped[-3:])
            self._say_once(f"{len(skipped)} of {len(source)} cannot be read, such as {skipped[0]}")
        if cut := found.get("cut"):
            self._say_once(f"{cut} texts have more than data.max_length={config.data.max_length} tokens and are cut")
        if long := found.get("too_long"):
            self._say_once(f"{long} answers have more than head.answer_length={config.head.answer_length} tokens")
        return found

    def _say_once(self, line: str) -> None:
        if rank() == 0 and line not in self.said:
            logger.warning("data.val: %s", line)
            self.said.add(line)


def validator(config: Config) -> HeldOut | None:
    """The measurement of `data.val` for the trainer, None without such data. All ranks call it together.

    Raises:
        DataError: the data cannot be used.
    """
    task = config.find_task()
    assert isinstance(task, DownstreamTask)
    if not config.data.val:
        return None
    source, section = task.open(config.data.val, config.data, split="val"), find_section(task.section)
    head = vars(config.head)
    options: dict[str, Any] = {"rerank": head["rerank"]} if "rerank" in head else {}
    if "beams" in head:
        options["captions"] = CaptionOptions(**{name: head[name] for name in WRITING})
    return HeldOut(config, source, section, options)
