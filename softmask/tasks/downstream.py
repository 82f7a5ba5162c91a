"""What is trained or measured after pre-training: tasks with their own data, head and metric, for some methods."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from softmask.models.config import Distillation
from softmask.tasks.base import Curve, Split, Task
from softmask.tasks.softmask_pp import alpha_at

if TYPE_CHECKING:
    from torch import Tensor, nn

    from softmask.batch import Batch, LabeledBatch
    from softmask.data import CaptionTokenizer, DataConfig, Record, Source
    from softmask.data.formats.examples import ExampleSource
    from softmask.models.config import SpecialIds

B = TypeVar("B", bound="Batch")
ENCODERS = ("backbone.vision.", "backbone.text.", "backbone.fusion.", "backbone.pooler.")
FIRST_STAGES = ("itm_head.weight", "caption_head.weight", "backbone.assignment.weight")
"""Tensors of the runs whose encoders alone a task starts from: pre-training's and text assignment's."""


@dataclass
class NoOptions:
    """The `head:` section of a task without options."""


class DownstreamTask(Task):
    """A task named by `task:` in a configuration, for the model of `method:`.

    Subclasses are modules of `softmask.tasks`, and a module's name is the task's. `model:` is the method's section,
    `head:` the task's own.

    Attributes:
        Head: the dataclass of the `head:` section.
        models: method -> `module:Class` of the model, which takes (the `model:` section, the `head:` section,
            special_ids=).
        section: the evaluation section that measures the task, as `module:Class`; empty: the task is not trained.
        frozen_section: the evaluation section that measures a pre-trained model on the task without training it, as
            `module:Class`; empty: there is none.
        metric: the name of what a validation compares, a key of that section unless `score` says otherwise.
        name: in the report.
        method: the method's own task.
        head: the `head:` section.
    """

    Head: type = NoOptions
    models: dict[str, str]
    section: str = ""
    frozen_section: str = ""
    metric: str
    name: str
    view: str = ""

    def __init__(self, method: Task, method_name: str, head: Any = None) -> None:
        if method_name not in self.models:
            known = ", ".join(self.models)
            raise ValueError(f"task: {type(self).__module__.rpartition('.')[2]} is for {known}, got {method_name}")
        self.method, self.head, self._model = method, head, self.models[method_name]
        self.Config, self.eval_resize = method.Config, method.eval_resize
        self.ends_captions, self.renamed = method.ends_captions, method.renamed

    def build(self, config: Any, special_ids: SpecialIds) -> nn.Module:
        if getattr(config.text, "checkpoint", ""):
            raise ValueError(
                f"text.checkpoint: expected nothing without init: pre-train first, got {config.text.checkpoint}"
            )
        module, _, name = self._model.partition(":")
        return getattr(importlib.import_module(module), name)(config, self.head, special_ids=special_ids)

    def score(self, result: dict[str, Any]) -> float:
        """What a validation compares, from the section of metrics.json; higher is better."""
        return float(result[self.metric])

    def weight_origins(self, model: Any) -> dict[str, str]:
        return {"vision": model.backbone.vision.weights_from}

    def sections(self, config: Any) -> tuple[str, ...]:
        return (self.section,)

    def title(self, config: Any) -> str:
        return f"{self.method.title(config)}, {self.name}"

    def facts(self, config: Any) -> list[tuple[str, str]]:
        """The options of `head:`; those of the method's pre-training, such as its queue, say nothing about the task."""
        return [(field.name.replace("_", " "), str(getattr(self.head, field.name))) for field in fields(self.head)]


class FewerTerms(DownstreamTask):
    """A task that trains the method's own model with some of its terms."""

    def terms(self, config: Any) -> Any:
        """The `model:` section with the task's terms alone."""
        raise NotImplementedError

    def build(self, config: Any, special_ids: SpecialIds) -> nn.Module:
        return self.method.build(self.terms(config), special_ids)

    def weight_origins(self, model: Any) -> dict[str, str]:
        return self.method.weight_origins(model)

    def title(self, config: Any) -> str:
        return super().title(self.terms(config))

    def facts(self, config: Any) -> list[tuple[str, str]]:
        return self.method.facts(self.terms(config)) + super().facts(config)


class DistilledTask(DownstreamTask):
    """A task whose model learns from a momentum copy, too: `head` is a `Distillation`."""

    Head = Distillation

    def step_options(self, config: Any, step: int, *, steps_per_epoch: float) -> dict[str, Any]:
        warmup_steps = self.head.alpha_warmup_epochs * steps_per_epoch
        return {"alpha": alpha_at(step, alpha=self.head.alpha, warmup_steps=warmup_steps)}


class FusedClassification(DistilledTask):
    """A task of SoftMask++ whose answer is a class of the fused CLS (models/softmask_pp/classifier.py).

    Attributes:
        reader: `module:function` that opens the task's files.
    """

    metric = "accuracy"
    new_parts = ("backbone.head",)
    curves = {"accuracy": Curve("Accuracy on training batches")}
    reader: str
    view = "softmask.report.tasks.labels:LabelView"

    def open(self, paths: str | Sequence[str], data: DataConfig, *, split: Split) -> Source:
        module, _, name = self.reader.partition(":")
        source = getattr(importlib.import_module(module), name)(paths_of(paths), image_root=data.image_root)
        return require_targets(source, split=split)

    def finish_batch(self, batch: Batch, records: Sequence[Record], tokenizer: CaptionTokenizer) -> Batch:
        return labeled(batch, records)

    def initial_weights(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return pretrained_encoders(given, distilled=self.head.alpha > 0)


def paths_of(paths: str | Sequence[str], *, folders: bool = False) -> list[str]:
    """The files that paths, globs or brace patterns name, in a text also several with commas between them; with
    `folders`, names that do not end in .tar are kept for the reader. Raises DataError if a file is missing."""
    from softmask.data.records import DataError
    from softmask.data.sources import expand_pattern

    patterns = _listed(paths) if isinstance(paths, str) else list(paths)
    if not patterns or not all(patterns):
        raise DataError("no data: expected the task's file or files, got nothing")
    found: list[str] = []
    for pattern in patterns:
        found += [pattern] if folders and not pattern.lower().endswith(".tar") else expand_pattern(pattern)
    return found


def _listed(paths: str) -> list[str]:
    """The parts between commas that are not within braces, unless the text itself is a path."""
    return [paths] if os.path.exists(paths) else re.split(r",(?![^{}]*})", paths)


def require_targets(source: ExampleSource, *, split: Split) -> ExampleSource:
    """The source. Raises DataError where training or validation has an example without an answer."""
    from softmask.data.records import DataError

    if split in ("train", "val") and source.unanswered:
        raise DataError(
            f"{', '.join(source.paths)}: {source.unanswered} of {len(source)} examples have no answer, which "
            f"{'training' if split == 'train' else 'validation'} needs"
        )
    return source


def labeled(batch: Batch, records: Sequence[Record]) -> LabeledBatch:
    """The batch with the records' targets, numbers of classes."""
    import torch

    from softmask.batch import LabeledBatch

    return finished(LabeledBatch, batch, labels=torch.tensor([record.target for record in records]))


def finished(kind: type[B], batch: Batch, **more: Any) -> B:
    """The batch as a batch of another kind, with more fields."""
    return kind(**{field.name: getattr(batch, field.name) for field in fields(batch)}, **more)


def pretrained_encoders(
    given: dict[str, Tensor], *, distilled: bool, more: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The encoders and fusion layers of a pre-trained model, with `more`, or the whole network of a model of the
    same task. `distilled`: also as the momentum copy's, where `given` has none of such a model."""
    pretrained = not given.keys().isdisjoint(FIRST_STAGES)
    kept = {name: tensor for name, tensor in given.items() if name.startswith(ENCODERS if pretrained else "backbone.")}
    kept |= more or {} if pretrained else {}
    if not distilled:
        return kept
    copies = {name.replace("backbone.", "momentum_encoder.", 1): tensor for name, tensor in kept.items()}
    own = {} if pretrained else {name: given[name] for name in given if name.startswith("momentum_encoder.")}
    return kept | copies | own


def without(given: dict[str, Tensor], parts: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of all other parts."""
    return {name: tensor for name, tensor in given.items() if not f"{name}.".startswith(tuple(f"{p}." for p in parts))}
