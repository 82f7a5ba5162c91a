"""Grounding as in RefCOCO: the map of an expression ranks an image's boxes, and plays the pointing game."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softmask.data import DataError, Record, TokenBatch, rle
from softmask.data.transforms import middle_box
from softmask.evaluation import metrics
from softmask.evaluation.readers import Scorer
from softmask.evaluation.sections import Evaluation, Section
from softmask.evaluation.tasks.boxes import BoxScore, box_scores, iou
from softmask.evaluation.tasks.examples import ExampleBatch, Prediction, predict_all

RIGHT = 0.5  # intersection over union of a right box, at least


@dataclass
class Grounded:
    """What is known of one expression."""

    cut: bool = False  # it was truncated
    box: list[float] | None = None  # the best proposal, the first of equals
    right: bool = False
    chance: float = 0.0  # share of the proposals that are right
    pointed: bool | None = None  # whether the map peaks inside the mask; None: there is no mask
    share: float = 0.0  # of the image that the mask takes


class BoxGrounding(Section):
    """Accuracy of the box with the largest score on the map of the expression; the model has `word_maps`.

    "chance" is the accuracy of a random proposal, "ceiling" the share of expressions with a right one. If some examples
    are marked as unseen, "unseen" has the same figures of them alone.
    """

    name = "grounding"

    def run(self, given: Evaluation) -> dict:
        scorer, reader = given.scorer, given.reader

        def predict(batch: ExampleBatch) -> list[Grounded | str]:
            return ground(scorer, batch, by=given.box_score)

        found = predict_all(scorer, reader, predict, by_picture=True)
        reader.skipped |= {one.index: one.value for one in found if isinstance(one.value, str)}
        found = [one for one in found if one.index not in reader.skipped]
        if not found:
            first = next(iter(reader.skipped.values()))
            raise DataError(f"{', '.join(reader.source.paths)}: no expression can be measured; the first: {first}")
        if given.predictions is not None:
            given.predictions.extend({"id": one.record.key, "box": one.value.box} for one in found)
        result = {"box_score": given.box_score, "skipped": len(reader.skipped), **scores(found)}
        unseen = [one for one in found if one.record.unseen]
        return result | ({"unseen": scores(unseen)} if unseen else {})

    def lines(self, result: dict, given: Evaluation) -> list[str]:
        lines = [f"grounding, {_line(result)}"]
        if result["cut"]:
            lines.append(f"  {result['cut']} expressions were truncated to {given.text_length} tokens")
        return lines + ([f"  with something unseen: {_line(result['unseen'])}"] if "unseen" in result else [])


def ground(scorer: Scorer, batch: ExampleBatch, *, by: BoxScore) -> list[Grounded | str]:
    """What the model finds for every expression, or why that cannot be measured."""
    tokens = [_words(batch.text, row) for row in range(len(batch.records))]
    maps = scorer.word_mapper.word_maps(
        batch.images,
        batch.text.input_ids,
        batch.text.attention_mask,
        metrics.stack_words([[row] for row in tokens]).to(scorer.device),
        kind="gradcam",
        normalize=None,
        kv_index=batch.pictures[:, 0],
    )
    crop, found = scorer.config.data.eval_resize == "crop", list[Grounded | str]()
    for row, (record, plane) in enumerate(zip(batch.records, maps.float().cpu(), strict=True)):
        height, width = record.target["size"]
        if (size := batch.sizes[int(batch.pictures[row, 0])]) != (width, height):
            found.append(
                f"{record.name}: {size[0]} x {size[1]} pixels, expected {width} x {height} as in the instances"
            )
        elif not tokens[row]:
            found.append(f"{record.name}: no word is left of {record.caption!r:.80}")
        elif not plane.isfinite().all():
            found.append(f"{record.name}: the model's map of {record.caption!r:.80} is not finite")
        else:
            window = middle_box(size) if crop else (0, 0, width, height)
            seen = (window[3] - window[1], window[2] - window[0])
            upsampled = metrics.upsample_maps(plane, scorer.model.patch_grid, seen)[0]
            found.append(_measured(upsampled, record, window, by, cut=bool(batch.text.cut[row])))
    return found


def _words(text: TokenBatch, row: int) -> list[int]:
    """Positions of the tokens of an expression, [CLS] and [SEP] apart: they have no characters."""
    return (text.offsets[row, :, 1] > text.offsets[row, :, 0]).nonzero().flatten().tolist()


def _measured(plane: Tensor, record: Record, window: tuple[int, int, int, int], by: BoxScore, *, cut: bool) -> Grounded:
    """The map `plane` is of the window (left, top, right, bottom) of the image."""
    target, (left, top, right, bottom) = record.target, window
    one = Grounded(cut=cut)
    if target["proposals"]:
        boxes = torch.tensor(target["proposals"], dtype=torch.float64)
        are_right = iou(boxes, torch.tensor(target["box"], dtype=torch.float64)) >= RIGHT
        values = box_scores(plane, boxes - torch.tensor([left, top, 0, 0]), by=by)
        # Equal scores count as wrong unless all of them are right: a constant map hits nothing by its order.
        one.right = bool(are_right[values == values.max()].all())
        one.box, one.chance = target["proposals"][int(values.argmax())], are_right.double().mean().item()
    if target["mask"] is not None:
        mask = torch.as_tensor(rle.decode(target["mask"]))[top:bottom, left:right]
        one.pointed, one.share = metrics.pointing_hit(plane, mask), mask.double().mean().item()
    return one


def scores(found: Sequence[Prediction]) -> dict[str, Any]:
    """Counts and shares of expressions. Those without a right proposal count as wrong."""
    values: list[Grounded] = [one.value for one in found]
    total = len(values)
    unreachable = sum(not one.chance for one in values)
    result = {
        "expressions": total,
        "images": len({one.record.image_id for one in found}),
        "cut": sum(one.cut for one in values),
        "without_right_box": unreachable,
        "accuracy": sum(one.right for one in values) / total,
        "chance": sum(one.chance for one in values) / total,
        "ceiling": 1 - unreachable / total,
    }
    masked = [one for one in values if one.pointed is not None]
    if not masked:
        return result
    return result | {
        "masks": len(masked),
        "pointing": sum(bool(one.pointed) for one in masked) / len(masked),
        "random": sum(one.share for one in masked) / len(masked),
    }


def _line(result: dict[str, Any]) -> str:
    shares = [f"{name} {100 * result[name]:.1f} %" for name in ("accuracy", "chance", "ceiling")]
    if "pointing" in result:
        shares.append(f"pointing game {100 * result['pointing']:.1f} %, random {100 * result['random']:.1f} %")
    return f"{result['expressions']} expressions about {result['images']} images: {', '.join(shares)}"
