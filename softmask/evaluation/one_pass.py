"""One pass over the data for all sections of metrics.json: each picture is decoded and encoded once.

Pictures are dealt out in pieces of a batch each, in the order of their first samples. The pieces do not depend on the
number of processes, which take them in turn, so figures are the same to the last digit on any number. Tokens and pixels
of a piece are dropped after it, unless a measure keeps them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from typing import Any, Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor

from softmask.evaluation.ranks import share_out
from softmask.evaluation.readers import Entry, Reader, Sample, Scorer, batches, pixels

R = TypeVar("R")


@dataclass
class Encoded:
    """Samples, and what the model makes of their pictures.

    Attributes:
        samples: in the order of their pictures' first samples, not of the source.
        picture: the number of each sample's picture.
        pixels: normalized pictures [I, 3, S, S], each once.
        tokens: [I, P, D].
        features: [I, d].
    """

    samples: list[Sample]
    picture: list[int]
    pixels: Tensor
    tokens: Tensor
    features: Tensor

    @cached_property
    def _first_places(self) -> list[int]:
        return [self.picture.index(number) for number in range(len(self.tokens))]

    @property
    def first(self) -> list[Sample]:
        """The first sample of every picture."""
        return [self.samples[place] for place in self._first_places]

    def select(self, places: Sequence[int]) -> Encoded:
        """The samples at these places, at least one, and their pictures alone."""
        if len(places) == len(self.samples):
            return self
        samples, picture = [self.samples[place] for place in places], [self.picture[place] for place in places]
        used = {number: new for new, number in enumerate(dict.fromkeys(picture))}
        kept = [self.pixels, self.tokens, self.features]
        if list(used) != list(range(len(self.tokens))):
            kept = [one[list(used)] for one in kept]
        return Encoded(samples, [used[number] for number in picture], *kept)

    def once(self) -> Encoded:
        """The first sample of every picture alone."""
        return self.select(self._first_places)


@torch.no_grad()
def encode(scorer: Scorer, samples: Sequence[Sample]) -> Encoded:
    """At least one sample with its picture encoded, each picture once, by image_id."""
    numbers: dict[int, int] = {}
    picture = [numbers.setdefault(sample.image_id, len(numbers)) for sample in samples]
    images = pixels(scorer, [samples[picture.index(number)] for number in range(len(numbers))])
    return Encoded(list(samples), picture, images, *scorer.model.encode_image(images))


def image_pieces(source: Any, indices: Iterable[int], size: int) -> list[list[int]]:
    """These samples in pieces of `size` pictures each, in the order of the pictures' first samples."""
    by_image: dict[int, list[int]] = {}
    for index in indices:
        by_image.setdefault(int(source.image_ids[index]), []).append(index)
    return [list(chain.from_iterable(some)) for some in batches(by_image.values(), size)]


class Measure(Generic[R]):
    """What a section looks at in one piece after another, on any of several processes.

    Attributes:
        gallery: of the first `pairs` readable samples alone.
    """

    gallery: bool = False

    def wants(self, entry: Entry) -> bool:
        """Whether a sample is looked at; pictures that no measure wants stay closed."""
        return True

    def look(self, seen: Encoded) -> R:
        """What a piece's samples tell all processes. It travels pickled: keep it small and on the CPU."""
        raise NotImplementedError

    def note(self, entries: Sequence[Entry]) -> R | None:
        """As `look`, for samples whose pictures were in an earlier piece: those of a gallery that take the places of
        unreadable ones may have such. None: nothing."""
        return None

    def result(self, found: Sequence[R]) -> Any:
        """The result of all pieces, on every process."""
        raise NotImplementedError


def measure_all(scorer: Scorer, reader: Reader, measures: Sequence[Measure], *, pairs: int = 0) -> list[Any]:
    """The results of the measures. All processes call it together and find the same; unreadable samples are in every
    process's `reader.skipped`. pairs: samples of the measures of a gallery; 0: all."""
    run = _Pass(scorer, reader, measures)
    run.fill_gallery(pairs or len(reader.source))
    run.finish()
    return [measure.result(found) for measure, found in zip(measures, run.found, strict=True)]


def measure_one(scorer: Scorer, reader: Reader, measure: Measure, *, pairs: int = 0) -> Any:
    """The result of one measure, as `measure_all`."""
    (result,) = measure_all(scorer, reader, [measure], pairs=pairs)
    return result


@dataclass
class _Told:
    """What a piece tells all processes."""

    found: list[list[Any]]  # of each measure
    samples: int  # readable ones of the gallery
    images: set[int]  # image_id of the gallery's new pictures
    skipped: dict[int, str]
    bad_objects: dict[str, str]


@dataclass
class _Pass:
    scorer: Scorer
    reader: Reader
    measures: Sequence[Measure]
    found: list[list[Any]] = field(init=False)  # of each measure
    opened: set[int] = field(default_factory=set)  # pieces
    shown: set[int] = field(default_factory=set)  # image_id of the gallery's pictures

    def __post_init__(self) -> None:
        self.found = [[] for _ in self.measures]

    @cached_property
    def pieces(self) -> list[list[int]]:
        source = self.reader.source
        return image_pieces(source, range(len(source)), self.scorer.batch_size)

    def fill_gallery(self, pairs: int) -> None:
        """The first `pairs` readable samples, read in turns: as many again as could not be read."""
        stop, samples, total = 0, 0, len(self.reader.source)
        while any(one.gallery for one in self.measures) and stop < total and samples < pairs:
            start, stop = stop, min(total, stop + pairs - samples)
            part = range(start, stop)
            numbers = [n for n, piece in enumerate(self.pieces) if any(index in part for index in piece)]
            samples += self._open(numbers, part)

    def finish(self) -> None:
        """What is left for measures of all samples."""
        if not all(one.gallery for one in self.measures):
            self._open([number for number in range(len(self.pieces)) if number not in self.opened], range(0))

    def _open(self, numbers: Sequence[int], part: range) -> int:
        """Show pieces to the measures: those of a gallery see the samples of `part`, the others all when a piece is
        opened first. Returns how many of `part` could be read."""
        told = share_out(numbers, partial(self._look, part=part), show="evaluating")
        for one in told:
            self.reader.skipped |= one.skipped
            self.reader.bad_objects |= one.bad_objects
            self.shown |= one.images
            for known, new in zip(self.found, one.found, strict=True):
                known += new
        self.opened |= set(numbers)
        return sum(one.samples for one in told)

    def _look(self, number: int, *, part: range) -> _Told:
        own, is_new = Reader(self.reader.source, self.reader.data), number not in self.opened
        whole = is_new and not all(one.gallery for one in self.measures)
        read = list(own.entries([index for index in self.pieces[number] if whole or index in part]))
        noted = [entry for entry, _ in read if entry.index in part and entry.image_id in self.shown]
        samples: list[Sample] = []
        places: list[list[int]] = [[] for _ in self.measures]  # of each one's samples
        images: dict[int, Image.Image] = {}
        for entry, encoded in read:
            in_gallery = entry.index in part and entry.image_id not in self.shown
            takers = [
                own_places
                for one, own_places in zip(self.measures, places, strict=True)
                if (in_gallery if one.gallery else is_new) and one.wants(entry)
            ]
            if takers and entry.image_id not in images and (image := own.decode(entry, encoded)):
                images[entry.image_id] = image
            if takers and entry.image_id in images:
                for own_places in takers:
                    own_places.append(len(samples))
                samples.append(own.sample(entry, images[entry.image_id]))
        of_gallery = [one for one in samples if one.index in part]
        return _Told(
            found=self._shown_to_measures(samples, places, noted),
            samples=len(of_gallery) + len(noted),
            images={one.image_id for one in of_gallery},
            skipped=own.skipped,
            bad_objects=own.bad_objects,
        )

    def _shown_to_measures(self, samples: list[Sample], places: list[list[int]], noted: list[Entry]) -> list[list[Any]]:
        """What each measure makes of its samples, those at its places, and of those whose pictures it knows."""
        seen = encode(self.scorer, samples) if samples else None
        found = []
        for measure, wanted in zip(self.measures, places, strict=True):
            own = [measure.look(seen.select(wanted))] if seen is not None and wanted else []
            if measure.gallery and noted and (more := measure.note(noted)) is not None:
                own.append(more)
            found.append(own)
        return found
