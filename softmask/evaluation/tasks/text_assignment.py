"""Accuracy of text assignment on captioned pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from softmask.evaluation.sections import Evaluation
from softmask.evaluation.tasks.examples import ExampleBatch, cut_count, predict_all
from softmask.evaluation.tasks.labels import LabelSection
from softmask.models.softmask_pp.text_assignment import PLACES


class TextAssignment(LabelSection):
    """Captions are right of the left picture, of the right one and of neither in turn. The wrong pictures are the most
    similar ones of the evaluation's batch, so figures depend on its size."""

    name = "text_assignment"
    labels = PLACES
    title = "text assignment"

    def run(self, given: Evaluation) -> dict:
        model: Any = given.scorer.model

        def predict(batch: ExampleBatch) -> list[tuple[int, list[float]]]:
            place = torch.arange(len(batch.records), device=batch.images.device) % len(PLACES)
            ids = torch.tensor([record.image_id for record in batch.records], device=batch.images.device)
            text = batch.text
            found = model.predict(batch.images, text.input_ids, text.attention_mask, ids=ids, place=place)
            return list(zip(place.tolist(), found.tolist(), strict=True))

        found = predict_all(given.scorer, given.reader, predict)
        predictions = [
            replace(one, record=replace(one.record, target=one.value[0]), value=one.value[1]) for one in found
        ]
        if given.predictions is not None:
            given.predictions.extend(map(self.row, predictions))
        return self.scores(predictions) | cut_count(predictions)
