"""Classification by a pre-trained model without fine-tuning: zero-shot by the names of the classes, and with training
images a linear probe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softmask.data import DataError
from softmask.data.formats.classification import TEMPLATES, beside, read_templates
from softmask.evaluation.gallery import encode_captions
from softmask.evaluation.readers import Reader, Scorer
from softmask.evaluation.sections import Evaluation, Section
from softmask.evaluation.tasks.classification import TOP
from softmask.evaluation.tasks.examples import ExampleBatch, predict_all
from softmask.evaluation.tasks.linear_probe import Labeled, fit
from softmask.evaluation.zero_shot import cut_prompt_lines

DEFAULT_TEMPLATES = ("{c}", "a picture of {c}", "a photo of a {c}.")
HELD_OUT = 0.1  # of the training images, on which the probe's weight decay is chosen


class FrozenClassification(Section):
    """Top-1 and top-5 by the most similar class name, each the mean over `zeroshot_classification_templates.txt` beside
    the data, and of a linear probe on `--training`, whose classes are matched by name."""

    name = "classification"

    def run(self, given: Evaluation) -> dict:
        scorer, source = given.scorer, given.reader.source
        test = features(scorer, given.reader)
        if not len(test.labels):
            raise DataError(f"no readable image in {', '.join(source.paths)}")
        templates = templates_of(source.paths[0])
        result: dict[str, Any] = {"samples": len(test.labels), "classes": len(source.classes)}
        prompts, cut = class_prompts(scorer, source.classes, templates)
        result |= {"cut_prompts": cut} if cut else {}
        result["zero_shot"] = {"templates": len(templates), **_shares(test.features @ prompts.T, test.labels)}
        result["chance"] = 1 / len(source.classes)
        if given.training is not None:
            train, val = features(scorer, given.training).split(HELD_OUT, seed=0)
            if (names := given.training.source.classes) != source.classes:
                raise DataError(f"--training: expected the classes of --data, {_difference(names, source.classes)}")
            probe = fit(train, val, classes=len(names))
            shares = _shares(probe.logits(test.features), test.labels)
            result["linear_probe"] = {"weight_decay": probe.decay, "validation_top1": probe.accuracy, **shares}
        return result

    def lines(self, result: dict, given: Evaluation) -> list[str]:
        lines = [f"classification, {result['samples']} images of {result['classes']} classes:"]
        for kind in ("zero_shot", "linear_probe"):
            if kind in result:
                shares = f"top-1 {100 * result[kind]['top1']:.1f} %, top-5 {100 * result[kind]['top5']:.1f} %"
                lines.append(f"  {kind.replace('_', ' '):12s} {shares}")
        return lines + cut_prompt_lines(result, length=given.text_length)


def features(scorer: Scorer, reader: Reader) -> Labeled:
    """The normalized image features of all readable images, and their classes."""

    def encode(batch: ExampleBatch) -> Sequence[Tensor]:
        return scorer.model.encode_image(batch.images)[1][batch.pictures[:, 0]].float().cpu().unbind()

    predictions = predict_all(scorer, reader, encode)
    stacked = torch.stack([one.value for one in predictions]) if predictions else torch.empty(0, 0)
    return Labeled(stacked, torch.tensor([one.record.target for one in predictions], dtype=torch.int64))


def templates_of(path: str) -> list[str]:
    """The templates beside the data, or `DEFAULT_TEMPLATES`."""
    file = beside(path, TEMPLATES)
    return read_templates(file) if file else list(DEFAULT_TEMPLATES)


def class_prompts(scorer: Scorer, names: Sequence[str], templates: Sequence[str]) -> tuple[Tensor, int]:
    """The normalized mean of each class's normalized prompt features, [C, d] on the CPU, and how many prompts were
    truncated."""
    prompts = [template.replace("{c}", name) for name in names for template in templates]
    _, found, read = encode_captions(scorer, prompts)
    mean = found.float().cpu().unflatten(0, (len(names), len(templates))).mean(1)
    return F.normalize(mean, dim=-1), int(read.cut.sum())


def _shares(scores: Tensor, labels: Tensor) -> dict[str, float]:
    order = scores.topk(min(max(TOP), scores.shape[1]), dim=1).indices
    return {f"top{k}": (order[:, :k] == labels[:, None]).any(1).double().mean().item() for k in TOP}


def _difference(names: Sequence[str], expected: Sequence[str]) -> str:
    missing = [name for name in expected if name not in names]
    return f"got {len(names)} of {len(expected)}" + (f", without {missing[0]!r}" if missing else ", in another order")
