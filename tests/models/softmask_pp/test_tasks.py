"""Models of tasks after pre-training against ALBEF's recipes, written plainly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from benchmarks.step.plain_tasks import PlainTasks
from softmask.batch import LabeledBatch
from softmask.models.config import Distillation, VqaHead
from softmask.models.softmask_pp.classifier import Nlvr2, SnliVe
from softmask.models.softmask_pp.vqa import Vqa
from tests.support.answer_fixtures import (
    answer_batch,
    answers,
    assert_gradients_equal,
    assert_pictures_are_shared,
    gradients,
)
from tests.support.model_fixtures import SPECIAL, small_batch, small_config

MODELS = {SnliVe: Distillation(), Nlvr2: Distillation(), Vqa: VqaHead()}


def small_task_model(kind: type) -> Any:
    """Weights larger than at initialization, and a momentum copy that differs."""
    torch.manual_seed(0)
    model = kind(small_config(), MODELS[kind], special_ids=SPECIAL)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(4.0) if parameter.ndim > 1 else parameter.normal_(std=0.1)
        for parameter in model.momentum_encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.double()


def labeled_batch(kind: type) -> LabeledBatch:
    batch = small_batch(6, dtype=torch.float64)
    images = torch.randn(6 * kind.pictures, 3, 32, 32, dtype=torch.float64)
    fields = vars(batch) | {"images": images}
    return LabeledBatch(**fields, labels=torch.arange(6) % kind.classes)


@pytest.mark.parametrize("kind", [SnliVe, Nlvr2])
def test_classifier_equals_albefs(kind: type) -> None:
    model, batch = small_task_model(kind), labeled_batch(kind)
    plain_model = copy.deepcopy(model)
    loss = model(batch, alpha=0.4).loss
    ours = gradients(loss, model)
    plain = PlainTasks(plain_model)
    logits = plain.classify(batch.images, batch.input_ids, batch.attention_mask)
    with torch.no_grad():
        teacher = copy.deepcopy(model)
        teacher.backbone = teacher.momentum_encoder
        soft = PlainTasks(teacher).classify(batch.images, batch.input_ids, batch.attention_mask).softmax(1)
    log_p = logits.log_softmax(1)
    hard = torch.nn.functional.nll_loss(log_p, batch.labels)
    expected = 0.6 * hard - 0.4 * (soft * log_p).sum(1).mean()
    torch.testing.assert_close(loss, expected)
    assert_gradients_equal(ours, gradients(expected, plain_model))
    predicted = model.predict(batch.images, batch.input_ids, batch.attention_mask)
    torch.testing.assert_close(predicted, logits.softmax(1).detach())


def test_nlvr2_tells_left_from_right() -> None:
    model, batch = small_task_model(Nlvr2), labeled_batch(Nlvr2)
    given = batch.input_ids, batch.attention_mask
    swapped = batch.images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    difference = model.predict(batch.images, *given) - model.predict(swapped, *given)
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("kind", [SnliVe, Nlvr2])
def test_texts_share_pictures(kind: type) -> None:
    """Pictures that several texts name equal copies of them."""
    model, batch = small_task_model(kind).eval(), labeled_batch(kind)
    given = batch.input_ids, batch.attention_mask
    pictures = torch.tensor([[2, 0], [0, 2], [1, 1], [3, 0], [3, 1], [0, 3]])[:, : kind.pictures]
    found = model.predict(batch.images[:4], *given, pictures=pictures)
    torch.testing.assert_close(found, model.predict(batch.images[pictures.flatten()], *given))
    assert (found.amax(0) - found.amin(0)).max() > 1e-3, "all predictions are the same: the test shows nothing"


def test_answer_loss_equals_albefs() -> None:
    model, batch = small_task_model(Vqa), answer_batch()
    plain_model = copy.deepcopy(model)
    loss = model(batch, alpha=0.4).loss
    expected = PlainTasks(plain_model).answer_loss(batch, alpha=0.4)
    torch.testing.assert_close(loss, expected)
    assert_gradients_equal(gradients(loss, model), gradients(expected, plain_model))


def test_questions_share_pictures() -> None:
    batch = small_batch(5, dtype=torch.float64)
    assert_pictures_are_shared(small_task_model(Vqa).eval(), batch.images, batch.input_ids, batch.attention_mask)


@pytest.mark.parametrize("k", [1, 7, 40])
def test_answer_ranking_equals_albefs(k: int) -> None:
    model, batch, (ids, mask) = small_task_model(Vqa), small_batch(5, dtype=torch.float64), answers(40)
    given = batch.images, batch.input_ids, batch.attention_mask
    numbers, scores = model.rank(model.read_questions(*given), model.list_answers(ids, mask), k=k)
    plain = PlainTasks(model)
    states = plain.question(model.backbone, *given)
    expected = plain.rank_answers(states, batch.attention_mask, ids, mask, k=k)
    best = expected.topk(k, dim=1)
    torch.testing.assert_close(scores.float(), best.values)
    assert scores.shape == (5, k) and torch.equal(expected.gather(1, numbers), best.values)


def test_generated_answers_are_the_most_probable_next_tokens() -> None:
    model, batch = small_task_model(Vqa), small_batch(5, dtype=torch.float64)
    given = batch.images, batch.input_ids, batch.attention_mask
    found = model.generate(*given, max_length=6)
    plain = PlainTasks(model)
    states = plain.question(model.backbone, *given)
    for row, ids in enumerate(found):
        ended = (ids == SPECIAL.sep).nonzero()
        length = int(ended[0]) + 1 if len(ended) else len(ids)
        assert (ids[length:] == SPECIAL.pad).all() and ids[0] == SPECIAL.cls
        written = ids[None, :length]
        logits = plain.answer_logits(
            model.backbone, written, torch.ones_like(written, dtype=torch.bool), states[row : row + 1],
            batch.attention_mask[row : row + 1],
        )  # fmt: skip
        assert torch.equal(logits[0, :-1].argmax(1), written[0, 1:])


@pytest.mark.parametrize("kind", MODELS)
def test_activation_checkpointing_changes_nothing(kind: type) -> None:
    batch = answer_batch() if kind is Vqa else labeled_batch(kind)
    plain, model = small_task_model(kind), small_task_model(kind)
    model.set_activation_checkpointing(True)
    expected = gradients(plain(batch, alpha=0.4).loss, plain)
    assert_gradients_equal(gradients(model(batch, alpha=0.4).loss, model), expected)
