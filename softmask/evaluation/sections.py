"""The sections of metrics.json. A task names those that its models support."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from softmask.evaluation import captioning, grounding, reconstruction, retrieval, zero_shot
from softmask.evaluation.captioning import CaptionOptions
from softmask.evaluation.one_pass import Measure, measure_all
from softmask.evaluation.readers import Reader, Sample, Scorer
from softmask.evaluation.retrieval import RerankBy
from softmask.evaluation.tasks.boxes import BoxScore
from softmask.evaluation.zero_shot import Class
from softmask.tasks.downstream import DownstreamTask, FewerTerms
from softmask.tasks.registry import known
from softmask.training.config import PRETRAIN, ConfigError


@dataclass
class Evaluation:
    """Model, data and options, the input of a section.

    Attributes:
        scorer: the model with its tokenizer and configuration.
        reader: all samples.
        training: training samples whose captions are compared with generated ones; None skips the comparison.
        pairs: size of the gallery; 0: all samples.
        rerank: number of candidates that ITM re-ranks.
        rerank_by: the score that re-ranks them.
        captions: options of caption generation.
        box_score: what grounding ranks boxes by.
        classes: classes of zero-shot classification; without classes the section is left out.
        predictions: sections of downstream tasks add the rows of the file of predictions; None: none is wanted.
    """

    scorer: Scorer
    reader: Reader
    training: Reader | None = None
    pairs: int = 256
    rerank: int = 16
    rerank_by: RerankBy = "match"
    captions: CaptionOptions = field(default_factory=CaptionOptions)
    box_score: BoxScore = "mean"
    classes: list[Class] = field(default_factory=list)
    predictions: list[dict[str, Any]] | None = None

    @property
    def text_length(self) -> int:
        """Tokens per caption; longer captions are truncated."""
        return self.scorer.config.data.max_length

    def first(self) -> Iterator[Sample]:
        """The samples of the gallery."""
        return islice(self.reader.all(), self.pairs or None)


class Section:
    """One object of metrics.json. For a section of your own, write a subclass and name it `module:Class` in your task.

    Attributes:
        name: key in metrics.json.
    """

    name: str

    def run(self, given: Evaluation) -> dict | None:
        """The object of metrics.json; None if the data has nothing to measure."""
        raise NotImplementedError

    def lines(self, result: dict, given: Evaluation) -> list[str]:
        """The object as lines for the terminal."""
        raise NotImplementedError


class MeasuredSection(Section):
    """A section that shares its pass over the data with others (one_pass.py)."""

    def measure(self, given: Evaluation) -> Measure | None:
        """What is looked at; None if there is nothing to measure. Its result is the object of metrics.json."""
        raise NotImplementedError

    def run(self, given: Evaluation) -> dict | None:
        return evaluate(given, [self]).get(self.name)


class Retrieval(MeasuredSection):
    """R@1, R@5 and R@10 in both directions."""

    name = "retrieval"

    def measure(self, given: Evaluation) -> Measure:
        return retrieval.Recalls(given.scorer, rerank=given.rerank, by=given.rerank_by)

    def lines(self, result: dict, given: Evaluation) -> list[str]:
        size = f"{result['images']} images and {result['samples']} captions"
        lines = [f"retrieval among {size}, R@1 / R@5 / R@10:"]
        if result["cut"]:
            lines.append(f"  {result['cut']} captions were truncated to {given.text_length} tokens")
        for stage in [name for name in ("itc", "itm", "chance") if name in result]:
            for way in ("i2t", "t2i"):
                shares = " / ".join(f"{100 * value:5.1f}" for value in result[stage][way].values())
                lines.append(f"  {stage:6s} {way}  {shares} %")
        if "unseen" in result:
            lines.append(self._unseen_line(result["unseen"]))
        return lines

    @staticmethod
    def _unseen_line(unseen: dict) -> str:
        stages = [
            f"{stage} {100 * unseen[stage]['i2t']['r1']:.1f} / {100 * unseen[stage]['t2i']['r1']:.1f} %"
            for stage in ("itc", "itm", "chance")
            if stage in unseen
        ]
        queries = f"{unseen['images']} images and {unseen['samples']} captions with unseen objects"
        return f"  {queries} alone, R@1 i2t / t2i: {', '.join(stages)}"


class Grounding(MeasuredSection):
    """The pointing game on samples with object masks; the model has `word_maps`."""

    name = "grounding"

    def measure(self, given: Evaluation) -> Measure:
        return grounding.PointingGame(given.scorer)

    def lines(self, result: dict, given: Evaluation) -> list[str]:
        shares = ", ".join(f"{key} {100 * result[key]:.1f} %" for key in ("pointing", "attention", "random"))
        return [f"pointing game with {result['words']} phrases: {shares}"]


class Captioning(MeasuredSection):
    """Scores of generated captions; the model is SyCoCa."""

    name = "captioning"

    def measure(self, given: Evaluation) -> Measure:
        return captioning.Captioning(given.scorer, given.training, given.captions)

    def lines(self, result: dict, given: Evaluation) -> list[str]:
        lines = [f"captions of {result['samples']} images, CIDEr / BLEU-4 / ROUGE-L:"]
        others = {key.replace("_", " "): result.get(key) for key in ("beams_alone", "nearest", "random")}
        for name, scores in {"model": result, **others}.items():
            if scores:
                shares = " / ".join(f"{100 * scores[key]:5.1f}" for key in ("cider", "bleu4", "rouge_l"))
                lines.append(f"  {name:11s} {shares}")
        return lines


class Reconstruction(MeasuredSection):
    """Error of hidden patches by caption; the model has `patch_size`, `hidden_patches` and `reconstruct`."""

    name = "reconstruction"

    def measure(self, given: Evaluation) -> Measure:
        return reconstruction.Reconstruction(given.scorer, given.reader)

    def lines(self, result: dict, given: Evaluation) -> list[str]:
        interval = f"{result['gap']:.4f} [{result['low']:.4f}, {result['high']:.4f}]"
        return [f"error of hidden patches {result['right']:.4f}, increase with a wrong caption: {interval}"]


class ZeroShot(MeasuredSection):
    """Zero-shot classification of images of a single object."""

    name = "zero_shot"

    def measure(self, given: Evaluation) -> Measure | None:
        return zero_shot.ZeroShot(given.scorer, given.classes) if given.classes else None

    def lines(self, result: dict, given: Evaluation) -> list[str]:
        shares = f"top-1 {100 * result['top1']:.1f} %, top-5 {100 * result['top5']:.1f} %"
        return [f"zero-shot, {result['samples']} images of {result['classes']} classes: {shares}"] + (
            zero_shot.cut_prompt_lines(result, length=given.text_length)
        )


SECTIONS = {kind.name: kind for kind in (Retrieval, Grounding, Captioning, Reconstruction, ZeroShot)}


def find_section(name: str) -> Section:
    """The section with a name of SECTIONS, or of `module:Class`.

    Raises:
        ValueError: unknown name, failed import, or not a Section.
    """
    if name in SECTIONS:
        return SECTIONS[name]()
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"evaluation section: expected {', '.join(SECTIONS)} or module:Class, got {name!r}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"evaluation section: {name} cannot be imported ({error})") from error
    if not (isinstance(found, type) and issubclass(found, Section)):
        raise ValueError(f"evaluation section: expected a subclass of softmask.evaluation.sections.Section, got {name}")
    return found()


def sections_of(scorer: Scorer) -> list[Section]:
    """The sections of the scorer's task, in the order of metrics.json.

    Raises:
        ConfigError: the task names an unknown section.
    """
    try:
        return [find_section(name) for name in scorer.config.find_task().sections(scorer.config.model)]
    except ValueError as error:
        raise ConfigError(f"{scorer.config.method}: {error}") from error


def for_task(scorer: Scorer, name: str) -> list[Section]:
    """The section that measures a pre-trained model on a task without training it; the scorer then reads its files.
    After fine-tuned retrieval the model is a pre-trained one, too.

    Raises:
        ConfigError: no such task, a task that has to be trained, or a model that is no pre-trained one.
    """
    if name == PRETRAIN:
        raise ConfigError(f"--task: expected {', '.join(known(DownstreamTask))}, got {PRETRAIN}")
    if scorer.config.task != PRETRAIN and not isinstance(scorer.config.find_task(), FewerTerms):
        raise ConfigError(f"--task: expected a pre-trained run, got one of task {scorer.config.task}")
    try:
        scorer.config = replace(scorer.config, task=name, head=None)
        task = scorer.config.find_task()
        assert isinstance(task, DownstreamTask)
        if not task.frozen_section:
            raise ValueError(f"{name} needs training: train/finetune.py")
        return [find_section(task.frozen_section)]
    except ValueError as error:
        raise ConfigError(f"--task: {str(error).removeprefix('task: ')}") from error


def evaluate(given: Evaluation, sections: list[Section]) -> dict[str, dict]:
    """The results of all sections that found something to measure, by name, from one pass over the data and those of
    sections that make their own."""
    asked = [(one.name, one.measure(given)) for one in sections if isinstance(one, MeasuredSection)]
    measures = {name: measure for name, measure in asked if measure is not None}
    results = measure_all(given.scorer, given.reader, list(measures.values()), pairs=given.pairs)
    found = dict(zip(measures, results, strict=True))
    found |= {one.name: one.run(given) for one in sections if not isinstance(one, MeasuredSection)}
    return {one.name: result for one in sections if (result := found.get(one.name))}
