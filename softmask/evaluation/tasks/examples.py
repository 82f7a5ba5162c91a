"""Predictions for the examples of a downstream task (data/formats), in pieces that any rank can do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from softmask.data import DataError, Record, SampleError, TokenBatch, decode_image, eval_transform
from softmask.evaluation.ranks import rank, share_out
from softmask.evaluation.readers import Reader, Scorer


@dataclass
class ExampleBatch:
    """Examples of consecutive numbers that could be read."""

    images: Tensor  # [N, 3, S, S], all pictures of the first example, then those of the second, ...
    text: TokenBatch
    records: list[Record]


@dataclass
class Prediction:
    """What the model says about one example: `value` is the task's own."""

    index: int  # in the source
    record: Record  # without its pictures
    value: Any


Predictor = Callable[[ExampleBatch], Sequence[Any]]
"""What the model says about each example of a batch."""


def predict_all(
    scorer: Scorer,
    reader: Reader,
    predict: Predictor,
    *,
    blank: bool = False,
    numbers: Sequence[int] | None = None,
) -> list[Prediction]:
    """`predict`'s values for all readable examples, in order, on every rank. Others are counted in `reader.skipped`.
    DataError if there are none.

    blank: pictures are grey, which shows what texts alone tell.
    numbers: of the examples; None: all.
    """
    size, asked = scorer.batch_size, range(len(reader.source)) if numbers is None else numbers
    pieces = [asked[first : first + size] for first in range(0, len(asked), size)]

    def work(piece: Sequence[int]) -> tuple[list[Prediction], dict[int, str]]:
        indices, batch, skipped = read_examples(scorer, reader, piece, blank=blank)
        if not indices:
            return [], skipped
        with torch.no_grad():
            values = predict(batch)
        bare = [replace(record, image_bytes=b"", more_images=()) for record in batch.records]
        return [Prediction(*one) for one in zip(indices, bare, values, strict=True)], skipped

    shown = tqdm(pieces, desc="predicting", disable=True if rank() else None, leave=False)
    found = share_out(shown, work)
    for _, skipped in found:
        reader.skipped |= skipped
    predictions = [prediction for some, _ in found for prediction in some]
    if not predictions:
        first = next(iter(reader.skipped.values()), "it is empty")
        raise DataError(f"{', '.join(reader.source.paths)}: no example can be read; the first: {first}")
    return predictions


def read_examples(
    scorer: Scorer, reader: Reader, piece: Sequence[int], *, blank: bool = False
) -> tuple[list[int], ExampleBatch, dict[int, str]]:
    """The numbers of the readable examples among `piece`, their batch, and the errors of the others."""
    transform = eval_transform(scorer.config.data)
    indices: list[int] = []
    images: list[Tensor] = []
    records: list[Record] = []
    skipped: dict[int, str] = {}
    for index in piece:
        try:
            record = reader.source.read(index)
            pictures = [transform(decode_image(encoded)) for encoded in (record.image_bytes, *record.more_images)]
        except SampleError as error:
            skipped[index] = str(error)
            continue
        except ValueError as error:
            skipped[index] = f"{record.name}: {error}"
            continue
        indices.append(index)
        records.append(record)
        images += [torch.zeros_like(picture) for picture in pictures] if blank else pictures
    if not indices:
        return [], ExampleBatch(torch.empty(0), scorer.tokens([]), []), skipped
    return indices, ExampleBatch(torch.stack(images).to(scorer.device), _tokens(scorer, records), records), skipped


def _tokens(scorer: Scorer, records: Sequence[Record]) -> TokenBatch:
    """The texts' tokens on the scorer's device."""
    tokens = scorer.tokens([record.caption for record in records])
    moved = {"input_ids": tokens.input_ids.to(scorer.device), "attention_mask": tokens.attention_mask.to(scorer.device)}
    return replace(tokens, **moved)
