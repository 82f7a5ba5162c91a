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
    cut: bool  # its text was truncated


def cut_count(predictions: Sequence[Prediction]) -> dict[str, int]:
    """ "cut", the number of truncated texts, for the metrics.json section; empty if there are none."""
    return {"cut": count} if (count := sum(one.cut for one in predictions)) else {}


def cut_lines(result: dict[str, Any], *, length: int, what: str) -> list[str]:
    """A line for the terminal if texts were truncated to `length` tokens."""
    return [f"  {result['cut']} {what} were truncated to {length} tokens"] if "cut" in result else []


def predict_all(
    scorer: Scorer, reader: Reader, predict: Callable[[ExampleBatch], Sequence[Any]], *, blank: bool = False
) -> list[Prediction]:
    """`predict`'s values for all readable examples, in order, on every rank. Others are counted in `reader.skipped`.
    DataError if there are none.

    blank: pictures are grey, which shows what texts alone tell.
    """
    size, count = scorer.batch_size, len(reader.source)
    pieces = [range(first, min(first + size, count)) for first in range(0, count, size)]

    def work(piece: range) -> tuple[list[Prediction], dict[int, str]]:
        indices, batch, skipped = _read(scorer, reader, piece, blank=blank)
        if not indices:
            return [], skipped
        with torch.no_grad():
            values = predict(batch)
        bare = [replace(record, image_bytes=b"", more_images=()) for record in batch.records]
        return [Prediction(*one) for one in zip(indices, bare, values, batch.text.cut.tolist(), strict=True)], skipped

    shown = tqdm(pieces, desc="predicting", disable=True if rank() else None, leave=False)
    found = share_out(shown, work)
    for _, skipped in found:
        reader.skipped |= skipped
    predictions = [prediction for some, _ in found for prediction in some]
    if not predictions:
        first = next(iter(reader.skipped.values()), "it is empty")
        raise DataError(f"{', '.join(reader.source.paths)}: no example can be read; the first: {first}")
    return predictions


def _read(
    scorer: Scorer, reader: Reader, piece: range, *, blank: bool
) -> tuple[list[int], ExampleBatch, dict[int, str]]:
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
