"""The sections of metrics.json, which a task names: what each computes and how the terminal shows it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from softmask.evaluation import captioning, grounding, reconstruction, retrieval, zero_shot
from softmask.evaluation.captioning import CaptionOptions
from softmask.evaluation.readers import Reader, Sample, Scorer
from softmask.evaluation.retrieval import RerankBy
from softmask.evaluation.zero_shot import Class
from softmask.training.config import ConfigError


@dataclass
class Evaluation:
    """What a section is given.

    Attributes:
        reader: the samples; those of `first()` are the gallery.
        training: samples of training that generated captions are compared with, None: without.
        pairs: size of the gallery; 0: all.
        rerank: candidates that ITM re-ranks, by the score `rerank_by`.
        text_length: tokens that are read of a caption.
        classes: of zero-shot classification.
    """

    scorer: Scorer
    reader: Reader
    training: Reader | None = None
    pairs: int = 256
    rerank: int = 16
    rerank_by: RerankBy = "match"
    captions: CaptionOptions = field(default_factory=CaptionOptions)
    classes: list[Class] = field(default_factory=list)

    @property
    def text_length(self) -> int:
        return self.scorer.config.data.max_length

    def first(self) -> Iterator[Sample]:
        """The samples of the gallery."""
        return islice(self.reader.all(), self.pairs or None)


class Section:
    """One object of metrics.json. A section of your own is a subclass that your task names as `module:Class`."""

    name: str  # its key in metrics.json

    def run(self, given: Evaluation) -> dict | None:
        """The object; None where the data has nothing to measure it by."""
        raise NotImplementedError

    def lines(self, result: dict, given: Evaluation) -> list[str]:
        """The object on the terminal."""
        raise NotImplementedError


class Retrieval(Section):
    name = "retrieval"

    def run(self, given: Evaluation) -> dict:
        return retrieval.retrieval(given.scorer, given.first(), rerank=given.rerank, by=given.rerank_by)

    def lines(self, result: dict, given: Evaluation) -> list[str]:
        size = f"{result['images']} images and {result['samples']} captions"
        lines = [f"retrieval among {size}, R@1 / R@5 / R@10:"]
        if result["cut"]:
            lines.append(
                f"  {result['cut']} captions have more than the {given.text_length} tokens that are read of them"
            )
        for stage in [name for name in ("itc", "itm", "chance") if name in result]:
            for way in ("i2t", "t2i"):
                shares = " / ".join(f"{100 * value:5.1f}" for value in result[stage][way].values())
                lines.append(f"  {stage:6s} {way}  {shares} %")
        return lines


class Grounding(Section):
    name = "grounding"

    def run(self, given: Evaluation) -> dict | None:
        return grounding.grounding(given.scorer, given.reader.all())

    def lines(self, result: dict, given: Evaluation) -> list[str]:
        shares = ", ".join(f"{key} {100 * result[key]:.1f} %" for key in ("pointing", "attention", "random"))
        return [f"pointing game with {result['words']} phrases: {shares}"]


class Captioning(Section):
    name = "captioning"

    def run(self, given: Evaluation) -> dict:
        return captioning.captioning(given.scorer, given.first(), given.training, given.captions)

    def lines(self, result: dict, given: Evaluation) -> list[str]:
        lines = [f"captions of {result['samples']} images, CIDEr / BLEU-4 / ROUGE-L:"]
        others = {key.replace("_", " "): result.get(key) for key in ("beams_alone", "nearest", "random")}
        for name, scores in {"model": result, **others}.items():
            if scores:
                shares = " / ".join(f"{100 * scores[key]:5.1f}" for key in ("cider", "bleu4", "rouge_l"))
                lines.append(f"  {name:11s} {shares}")
        return lines


class Reconstruction(Section):
    name = "reconstruction"

    def run(self, given: Evaluation) -> dict | None:
        return reconstruction.reconstruction(given.scorer, given.first())

    def lines(self, result: dict, given: Evaluation) -> list[str]:
        interval = f"{result['gap']:.4f} [{result['low']:.4f}, {result['high']:.4f}]"
        return [f"error of hidden patches {result['right']:.4f}, more by a wrong caption: {interval}"]


class ZeroShot(Section):
    name = "zero_shot"

    def run(self, given: Evaluation) -> dict | None:
        return zero_shot.zero_shot(given.scorer, given.reader.all(), given.classes) if given.classes else None

    def lines(self, result: dict, given: Evaluation) -> list[str]:
        shares = f"top-1 {100 * result['top1']:.1f} %, top-5 {100 * result['top5']:.1f} %"
        return [f"zero-shot, {result['samples']} images of {result['classes']} classes: {shares}"]


SECTIONS = {kind.name: kind for kind in (Retrieval, Grounding, Captioning, Reconstruction, ZeroShot)}


def find_section(name: str) -> Section:
    """The section of a name, or of `module:Class`.

    Raises:
        ValueError: there is none.
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
    """Of the scorer's task, in the order of metrics.json.

    Raises:
        ConfigError: the task names one that is not there.
    """
    try:
        return [find_section(name) for name in scorer.config.task.sections(scorer.config.model)]
    except ValueError as error:
        raise ConfigError(f"{scorer.config.method}: {error}") from error


def evaluate(given: Evaluation, sections: list[Section]) -> dict[str, dict]:
    """Every section that the data has something for, by name."""
    found = ((section.name, section.run(given)) for section in sections)
    return {name: result for name, result in found if result}
