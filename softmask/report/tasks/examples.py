"""The view of a task whose examples have a right answer: its figures, and right and wrong examples with word maps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from PIL import Image
from torch import Tensor

from softmask.data import Record, decode_image
from softmask.data.transforms import middle_box
from softmask.evaluation import metrics
from softmask.evaluation.grounding import Word
from softmask.evaluation.readers import Scorer
from softmask.evaluation.sections import find_section
from softmask.evaluation.tasks.examples import ExampleBatch, Prediction, Predictor, predict_all, read_examples
from softmask.report.images import data_uri, heat_overlay, limited
from softmask.report.page import section
from softmask.report.tasks.cards import Card, Guess, WordMaps, cards
from softmask.report.view import Given, Shown, View, spread
from softmask.report.word_maps import content_words, map_legend
from softmask.tasks.downstream import DownstreamTask

CANDIDATES = 20  # examples that are answered for each that is shown
SIDE = 256  # pixels of a picture's longer side
WORDS = 4  # most words with maps


class ExampleView(View):
    """Subclasses say what an answer is.

    Attributes:
        specification: the task's section of metrics.json, as metrics_file.py checks it.
        pictures: names of an example's pictures; empty for a single one.
        explained: what the maps of words are the Grad-CAM of.
    """

    shows_blank = True
    specification: dict[str, Any]
    pictures: Sequence[str] = ()
    explained: str = ""

    @cached_property
    def section(self) -> Any:
        """The evaluation section that measures the task."""
        assert isinstance(self.task, DownstreamTask)
        return find_section(self.task.section)

    @property
    def needed(self) -> dict[str, Any]:
        return {self.section.name: self.specification}

    # -- what subclasses say --------------------------------------------------------------------------------------

    def tiles(self, result: dict[str, Any], blank: dict[str, Any] | None) -> list[str]:
        """The headline numbers."""
        raise NotImplementedError

    def figures(self, result: dict[str, Any], blank: dict[str, Any] | None) -> list[str]:
        """The sections with the task's figures."""
        raise NotImplementedError

    def predictor(self, scorer: Scorer) -> Predictor:
        """The model's answers, best first, in a form that `guesses` reads."""
        return self.section.predictor(scorer)

    def guesses(self, scorer: Scorer, one: Prediction) -> list[Guess]:
        """The model's answers, best first."""
        raise NotImplementedError

    def answer(self, scorer: Scorer, record: Record) -> str:
        """The right answer of an example that has one."""
        raise NotImplementedError

    # -- the examples ---------------------------------------------------------------------------------------------

    def show(self, given: Given) -> Shown:
        result = given.result[self.section.name]
        blank = None if given.blank is None else given.blank[self.section.name]
        return Shown(self.tiles(result, blank), [*self.figures(result, blank), self.examples(given)])

    def examples(self, given: Given) -> str:
        """The section of examples."""
        scorer, source = given.scorer, given.reader.source
        numbers = spread(len(source), CANDIDATES * given.count)
        predictions = predict_all(scorer, given.reader, self.predictor(scorer), numbers=numbers)
        guesses = {one.index: self.guesses(scorer, one) for one in predictions}
        right = {index: found[0].right for index, found in guesses.items()}
        chosen = choose([index for index in right], right, given.count)
        shown: list[Card] = []
        for first in range(0, len(chosen), scorer.batch_size):
            found, batch, _ = read_examples(scorer, given.reader, chosen[first : first + scorer.batch_size])
            if batch is None:  # they could be read a moment ago
                continue
            maps = word_maps(scorer, batch, [pictures_of(scorer, record) for record in batch.records])
            for index, record, words in zip(found, batch.records, maps, strict=True):
                shown.append(self.card(scorer, record, guesses[index], words))
        note = selection(right, chosen, total=len(source))
        with_maps = any(one.words for one in shown)
        legend = map_legend("map, scaled to its range") if with_maps else ""
        if with_maps:
            layer = scorer.config.model.cam_layer + 1
            note += (
                f" Maps are of up to {WORDS} words of the text: Grad-CAM of {self.explained}, at fusion layer {layer}."
            )
        return section("examples", "Examples", note, legend + cards(shown))

    def card(self, scorer: Scorer, record: Record, guesses: list[Guess], words: list[WordMaps]) -> Card:
        return Card(
            pictures=[data_uri(picture) for picture in pictures_of(scorer, record)],
            names=self.pictures,
            text=record.caption,
            answer="" if record.target is None else self.answer(scorer, record),
            guesses=guesses,
            aside="with something that training never shows" if record.unseen else "",
            words=words,
        )


def choose(numbers: Sequence[int], right: dict[int, bool | None], count: int) -> list[int]:
    """`count` of the numbers in order, spaced evenly over those that are wrong and over the others: half of each, or
    more of one where the other has too few."""
    wrong = [number for number in numbers if right[number] is False]
    others = [number for number in numbers if right[number] is not False]
    of_others = min(len(others), count - min(len(wrong), count // 2))
    of_wrong = min(len(wrong), count - of_others)
    pairs = ((wrong, of_wrong), (others, of_others))
    return sorted(found[place] for found, wanted in pairs for place in spread(len(found), wanted))


def selection(right: dict[int, bool | None], chosen: Sequence[int], *, total: int) -> str:
    """How the examples were chosen, in words."""
    wrong = [number for number, value in right.items() if value is False]
    shown = len(set(wrong) & set(chosen))
    of = f"{len(right):,} examples spaced evenly over the data" if len(right) < total else f"all {total:,} examples"
    if all(value is None for value in right.values()):
        return f"{len(chosen)} of {of}; their right answers are not known."
    wrongly = f"{shown} of the {len(wrong):,} that the model answers wrongly"
    others = f"{len(chosen) - shown} of the other {len(right) - len(wrong):,}"
    return f"Of {of}, {wrongly} and {others}. Probabilities are in percent."


def pictures_of(scorer: Scorer, record: Record) -> list[Image.Image]:
    """The parts of the pictures that the model sees, of the size that is shown."""
    images = [decode_image(encoded) for encoded in (record.image_bytes, *record.more_images)]
    if scorer.config.data.eval_resize == "crop":
        images = [image.crop(middle_box(image.size)) for image in images]
    return [limited(image, SIDE) for image in images]


def word_maps(scorer: Scorer, batch: ExampleBatch, pictures: Sequence[Sequence[Image.Image]]) -> list[list[WordMaps]]:
    """Maps of each text's words over its pictures; none if the model has none."""
    model: Any = scorer.model
    # A single fusion layer computes CLS alone, which points at nothing.
    if not (hasattr(model, "word_maps_by_picture") and scorer.config.model.text.fusion_layers > 1):
        return [[] for _ in batch.records]
    texts = [record.caption for record in batch.records]
    words = [_different(content_words(text, batch.text, row))[:WORDS] for row, text in enumerate(texts)]
    index = metrics.stack_words([[word.tokens for word in row] for row in words]).to(scorer.device)
    maps = model.word_maps_by_picture(
        batch.own_images,
        batch.text.input_ids,
        batch.text.attention_mask,
        index,
        normalize=scorer.config.model.normalize,
    )
    return [
        [_draw(scorer, word, maps[row, :, place].float().cpu(), pictures[row]) for place, word in enumerate(found)]
        for row, found in enumerate(words)
    ]


def _different(words: Sequence[Word]) -> list[Word]:
    """The words without those that are there already."""
    return list({word.text.lower(): word for word in reversed(words)}.values())[::-1]


def _draw(scorer: Scorer, word: Word, maps: Tensor, pictures: Sequence[Image.Image]) -> WordMaps:
    """maps: [pictures, patches] of the word."""
    overlays = []
    for patches, picture in zip(maps, pictures, strict=True):
        size = (picture.height, picture.width)
        plane = metrics.upsample_maps(patches[None], scorer.model.patch_grid, size)[0]
        overlays.append(data_uri(heat_overlay(picture, plane), quality=84))
    return WordMaps(word.text, word.span, overlays)
