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
        images: different pictures [I, 3, S, S], each once.
        sizes: (width, height) of the stored pictures, I of them.
        pictures: [B, n], the numbers of each example's pictures.
    """

    images: Tensor
    text: TokenBatch
    records: list[Record]
    sizes: list[tuple[int, int]]
    pictures: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures, token ids and masks, as models take them together with `pictures`."""
        return self.images, self.text.input_ids, self.text.attention_mask

    @property
    def own_images(self) -> Tensor:
        """[n * B, 3, S, S]: all pictures of the first example, then those of the second, ..."""
        return self.images[self.pictures.flatten()]


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
    by_picture: bool = False,
) -> list[Prediction]:
    """`predict`'s values for all readable examples, in order, on every rank. Others are counted in `reader.skipped`.
    DataError if there are none.

    numbers: of the examples; None: all.
    by_picture: examples of the same first picture are predicted together.
    """
    size, asked = scorer.batch_size, range(len(reader.source)) if numbers is None else numbers
    if by_picture:
        asked = sorted(asked, key=reader.source.image_ids.__getitem__)
    pieces = [asked[first : first + size] for first in range(0, len(asked), size)]

    def work(piece: Sequence[int]) -> tuple[list[Prediction], dict[int, str]]:
        indices, batch, skipped = read_examples(scorer, reader, piece)
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
    scorer: Scorer, reader: Reader, piece: Sequence[int]
) -> tuple[list[int], ExampleBatch | None, dict[int, str]]:
    """The numbers of the readable examples among `piece`, their batch, and the errors of the others. A picture of
    several examples is decoded once."""
    transform = eval_transform(scorer.config.data)
    indices: list[int] = []
    images: list[Tensor] = []
    records: list[Record] = []
    sizes: list[tuple[int, int]] = []
    pictures: list[list[int]] = []
    skipped: dict[int, str] = {}
    numbers: dict[bytes, int] = {}  # of encoded pictures
    for index in piece:
        try:
            record = reader.source.read(index)
            shown = (record.image_bytes, *record.more_images)
            new = {encoded: decode_image(encoded) for encoded in shown if encoded not in numbers}
            seen = list(map(transform, new.values()))
        except SampleError as error:
            skipped[index] = str(error)
            continue
        except ValueError as error:
            skipped[index] = f"{record.name}: {error}"
            continue
        indices.append(index)
        records.append(record)
        numbers |= {encoded: number for number, encoded in enumerate(new, len(images))}
        pictures.append([numbers[encoded] for encoded in shown])
        sizes += [picture.size for picture in new.values()]
        images += seen
    if not indices:
        return [], None, skipped
    stacked, owners = torch.stack(images).to(scorer.device), torch.tensor(pictures, device=scorer.device)
    return indices, ExampleBatch(stacked, _tokens(scorer, records), records, sizes, owners), skipped


def _tokens(scorer: Scorer, records: Sequence[Record]) -> TokenBatch:
    """The texts' tokens on the scorer's device."""
    tokens = scorer.tokens([record.caption for record in records])
    moved = {"input_ids": tokens.input_ids.to(scorer.device), "attention_mask": tokens.attention_mask.to(scorer.device)}
    return replace(tokens, **moved)
