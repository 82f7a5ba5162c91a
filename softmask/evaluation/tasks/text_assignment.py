"""Accuracy of text assignment on captioned pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from softmask.data import DataError
from softmask.evaluation.sections import Evaluation
from softmask.evaluation.tasks.examples import ExampleBatch, Prediction, cut_count, predict_all
from softmask.evaluation.tasks.labels import LabelSection, best
from softmask.models.softmask_pp.text_assignment import PLACES, have_others


class TextAssignment(LabelSection):
    """Captions are right of the left picture, of the right one and of neither in turn. The wrong pictures are the most
    similar ones of the evaluation's batch, so figures depend on its size."""

    name = "text_assignment"
    labels = PLACES
    title = "text assignment"

    def run(self, given: Evaluation) -> dict:
        model: Any = given.scorer.model

        def predict(batch: ExampleBatch) -> list[tuple[int, list[float], bool]]:
            place = torch.arange(len(batch.records), device=batch.images.device) % len(PLACES)
            ids = torch.tensor([record.image_id for record in batch.records], device=batch.images.device)
            text = batch.text
            found = model.predict(batch.own_images, text.input_ids, text.attention_mask, ids=ids, place=place)
            return list(zip(place.tolist(), found.tolist(), have_others(ids).tolist(), strict=True))

        predictions = []
        found = predict_all(given.scorer, given.reader, predict)
        for one in found:
            place, probabilities, counts = one.value
            if counts:
                predictions.append(replace(one, record=replace(one.record, target=place), value=probabilities))
        if given.predictions is not None:
            given.predictions.extend(map(self.row, predictions))
        if not predictions:
            raise DataError("text assignment needs pictures of different images in a batch: raise --batch-size")
        left_out = len(found) - len(predictions)
        result = self.scores(predictions) | cut_count(predictions)
        return result | ({"left_out": left_out} if left_out else {})

    def row(self, one: Prediction) -> dict[str, Any]:
        return {"caption": one.record.name, "shown": PLACES[one.record.target], "label": PLACES[best(one.value)]}

    def lines(self, result: dict, given: Evaluation) -> list[str]:
        left_out = result.get("left_out")
        more = [f"  {left_out} captions are left out: no other image was in their batch"] if left_out else []
        return super().lines(result, given) + more
