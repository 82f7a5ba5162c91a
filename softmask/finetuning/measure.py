"""A task's own metric on held-out data during training."""

from __future__ import annotations

import logging
from typing import Any

import torch

from softmask.data import CaptionTokenizer, DataError
from softmask.data.loader import check_bad_share
from softmask.evaluation.captioning import WRITING, CaptionOptions
from softmask.evaluation.ranks import rank
from softmask.evaluation.readers import Reader, Scorer
from softmask.evaluation.sections import Evaluation, find_section
from softmask.tasks.downstream import DownstreamTask
from softmask.training.config import Config
from softmask.training.validation import Validate

logger = logging.getLogger("softmask.data")


def validator(config: Config) -> Validate | None:
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

    said: set[str] = set()

    def say_once(line: str) -> None:
        if rank() == 0 and line not in said:
            logger.warning("data.val: %s", line)
            said.add(line)

    def measure(model: Any, tokenizer: CaptionTokenizer, device: torch.device) -> dict[str, Any]:
        scorer = Scorer(model, tokenizer, config, device=device, batch_size=config.train.batch_size)
        reader = Reader(source, config.data)
        found = section.run(Evaluation(scorer=scorer, reader=reader, pairs=0, **options))
        if found is None:
            raise DataError(f"data.val: {', '.join(source.paths)} has nothing to measure {config.task} on")
        if skipped := list(reader.skipped.values()):
            check_bad_share(len(skipped), len(source), allowed=config.data.max_bad_share, names=skipped[-3:])
            say_once(f"{len(skipped)} of {len(source)} cannot be read, such as {skipped[0]}")
        if cut := found.get("cut"):
            say_once(f"{cut} texts have more than data.max_length={config.data.max_length} tokens and are cut")
        if long := found.get("too_long"):
            say_once(f"{long} answers have more than head.answer_length={config.head.answer_length} tokens")
        return found

    return measure
