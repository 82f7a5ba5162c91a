"""The head of the report: facts about the run in a table and a sentence."""

from __future__ import annotations

import statistics

from softmask.evaluation.readers import Scorer
from softmask.report.metrics_file import is_number
from softmask.report.page import duration
from softmask.tasks.downstream import DownstreamTask


def facts(scorer: Scorer, state: dict, rows: list[dict]) -> list[tuple[str, str]]:
    """The table of facts: what was trained, and how. `state` is the checkpoint's trainer.json."""
    config = scorer.config
    model, train = config.model, config.train
    ranks = state["world_size"]
    learned = sum(weight.numel() for weight in scorer.model.parameters() if weight.requires_grad)
    rates = [row["samples_per_second"] for row in rows if is_number(row.get("samples_per_second"))]
    return [
        ("Steps", f"{state['step']:,}"),
        ("Training time", duration(state["seconds"])),
        ("Throughput", f"{statistics.median(rates):,.0f} samples/s" if rates else "not logged"),
        ("Batch", f"{train.batch_size * train.accumulation * ranks:,} on {ranks} {'rank' if ranks == 1 else 'ranks'}"),
        ("Parameters", f"{learned / 1e6:.1f} M trained"),
        ("Image encoder", f"{model.vision.name}, {config.data.image_size} px"),
        *config.find_task().facts(model),
        *[("Pictures", "grey, in training and evaluation")] * config.data.blank,
        ("Distortions", "on" if config.data.distort else "off"),
        ("Precision", f"{train.precision}, ZeRO {config.zero_stage}"),
        ("Peak learning rate", f"{config.optimizer.lr:g}"),
        ("Unreadable samples", f"{state['skipped_samples']:,} replaced"),
        ("Seed", str(config.seed)),
    ]


def kicker(scorer: Scorer) -> str:
    """The line above the title."""
    return "Fine-tuning report" if isinstance(scorer.config.find_task(), DownstreamTask) else "Pre-training report"


def lead(scorer: Scorer) -> str:
    """The sentence under the title."""
    task, model = scorer.config.find_task(), scorer.config.model
    if isinstance(task, DownstreamTask):
        start = f"fine-tuned from {scorer.config.init}" if scorer.config.init else "trained without pre-training"
        return f"A vision-language model, {start}, for {task.name}."
    parts = task.additions(model)
    additions = f", with {' and '.join(parts)}" if parts else ""
    return (
        f"A vision-language model pre-trained on captioned images only{additions}. Without boxes or labels, it learned "
        f"from captions {task.learned(model)}."
    )
