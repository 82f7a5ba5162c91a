"""Predictions for the examples of a downstream task (data/formats), in pieces that any rank can do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from softmask.data import DataError, Record, SampleError, TokenBatch, decode_image, eval_transform
from softmask.evaluation.ranks import share_out
from softmask.evaluation.readers import Reader, Scorer


@dataclass
class ExampleBatch:
    """Examples of a piece that could be read.

    Attributes:
        images: [N, 3, S, S], all pictures of the first example, then those of the second, ...; shared ones once.
        sizes: (width, height) of the stored pictures, N of them.
        image_index: the number of each example's first picture.
    """

    images: Tensor
    text: TokenBatch
    records: list[Record]
    sizes: list[tuple[int, int]]
    image_index: list[int]

    @property
    def first_images(self) -> Tensor:
        """[B, 3, S, S], the first picture of each example."""
        return self.images[torch.tensor(self.image_index, device=self.images.device)]


@dataclass
class Prediction:
    """What the model says about one example: `value` is the task's own."""

    index: int  # in the source
    record: Record  # without its pictures
    value: Any
    cut: bool  # its text was truncated


def cut_count(predictions: Sequence[Prediction]) -> dict[str, int]:
    """ "cut", the number of truncated texts, for the metrics.json section; empty if there are none."""
    return {"cut": count} if (count := sum(one.cut for one in predictions)) else {}


def cut_lines(result: dict[str, Any], *, length: int, what: str) -> list[str]:
    """A line for the terminal if texts were truncated to `length` tokens."""
    return [f"  {result['cut']} {what} were truncated to {length} tokens"] if "cut" in result else []


Predictor = Callable[[ExampleBatch], Sequence[Any]]
"""What the model says about each example of a batch."""


def predict_all(
    scorer: Scorer,
    reader: Reader,
    predict: Predictor,
    *,
    numbers: Sequence[int] | None = None,
    share_pictures: bool = False,
) -> list[Prediction]:
    """`predict`'s values for all readable examples, in order, on every rank. Others are counted in `reader.skipped`.
    DataError if there are none.

    numbers: of the examples; None: all.
    share_pictures: of examples of one picture each; those of the same picture are predicted together, and it is decoded
        once.
    """
    size, asked = scorer.batch_size, range(len(reader.source)) if numbers is None else numbers
    if share_pictures:
        asked = sorted(asked, key=reader.source.image_ids.__getitem__)
    pieces = [asked[first : first + size] for first in range(0, len(asked), size)]

    def work(piece: Sequence[int]) -> tuple[list[Prediction], dict[int, str]]:
        indices, batch, skipped = read_examples(scorer, reader, piece, share_pictures=share_pictures)
        if batch is None:
            return [], skipped
        with torch.no_grad():
            values = predict(batch)
        bare = [replace(record, image_bytes=b"", more_images=()) for record in batch.records]
        return [Prediction(*one) for one in zip(indices, bare, values, batch.text.cut.tolist(), strict=True)], skipped

    found = share_out(pieces, work, show="predicting")
    for _, skipped in found:
        reader.skipped |= skipped
    predictions = sorted((one for some, _ in found for one in some), key=lambda one: one.index)
    if not predictions:
        first = next(iter(reader.skipped.values()), "it is empty")
        raise DataError(f"{', '.join(reader.source.paths)}: no example can be read; the first: {first}")
    return predictions


def read_examples(
    scorer: Scorer, reader: Reader, piece: Sequence[int], *, share_pictures: bool = False
) -> tuple[list[int], ExampleBatch | None, dict[int, str]]:
    """The numbers of the readable examples among `piece`, their batch, and the errors of the others."""
    transform = eval_transform(scorer.config.data)
    indices: list[int] = []
    images: list[Tensor] = []
    records: list[Record] = []
    sizes: list[tuple[int, int]] = []
    image_index: list[int] = []
    skipped: dict[int, str] = {}
    numbers: dict[int, int] = {}  # of shared pictures, by image_id
    for index in piece:
        try:
            record = reader.source.read(index)
            shown = share_pictures and record.image_id in numbers
            pictures = [] if shown else list(map(decode_image, (record.image_bytes, *record.more_images)))
            seen = list(map(transform, pictures))
        except SampleError as error:
            skipped[index] = str(error)
            continue
        except ValueError as error:
            skipped[index] = f"{record.name}: {error}"
            continue
        indices.append(index)
        records.append(record)
        image_index.append(numbers.setdefault(record.image_id, len(images)) if share_pictures else len(images))
        sizes += [picture.size for picture in pictures]
        images += seen
    if not indices:
        return [], None, skipped
    stacked = torch.stack(images).to(scorer.device)
    return indices, ExampleBatch(stacked, _tokens(scorer, records), records, sizes, image_index), skipped


def _tokens(scorer: Scorer, records: Sequence[Record]) -> TokenBatch:
    """The texts' tokens on the scorer's device."""
    tokens = scorer.tokens([record.caption for record in records])
    moved = {"input_ids": tokens.input_ids.to(scorer.device), "attention_mask": tokens.attention_mask.to(scorer.device)}
    return replace(tokens, **moved)
