"""VQA on SyCoCa against plain passes over one text for each pair of a question and an answer, in fp64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.step.plain_sycoca import attention
from softmask.models.config import VqaHead
from softmask.models.sycoca.vqa import Vqa
from tests.support.answer_fixtures import (
    answer_batch,
    answers,
    assert_gradients_equal,
    assert_pictures_are_shared,
    gradients,
)
from tests.support.model_fixtures import COCA, POOLED, SPECIAL, small_batch, small_sycoca

STYLES = [{}, COCA | POOLED, {"style": "open_clip"}]


def small_vqa(**options: Any) -> Any:
    """Weights larger than at initialization, room for question and answer, and a momentum copy that differs."""
    config = small_sycoca(**options).config
    config.text.max_positions = 16
    torch.manual_seed(0)
    model = Vqa(config, VqaHead(), special_ids=SPECIAL)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "vision" not in name:
                parameter.mul_(4.0 if "caption_head" not in name else 8.0)
        for parameter in model.momentum_encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.double()


def plain_logits(network: Any, context: Tensor, question: list[int], answer: list[int]) -> Tensor:
    """[T, vocabulary] after the question's last token and after each token of the answer, from its first on."""
    ids = torch.tensor(question + answer[1:])
    text, decoder = network.text, network.caption_decoder
    causal = torch.full((len(ids), len(ids)), -torch.inf, dtype=torch.float64).triu(1)
    x = (text.word(ids) + text.position(torch.arange(len(ids))))[None]
    for block in text.blocks:
        x = block.feed_forward(attention(block.attention, x, mask=causal))
    x = x if text.open_clip else text.norm(x)
    for own, cross in zip(decoder.own, decoder.cross, strict=True):
        x = own.feed_forward(attention(own.attention, x, mask=causal))
        x = cross.feed_forward(attention(cross.attention, x, context[None]))
    return (decoder.norm(x) @ network.caption_head.weight.T)[0, len(question) - 1 :]


def contexts(network: Any, batch: Any) -> Tensor:
    """[B, P, D]: in training BatchNorm looks at all images."""
    return network.pool(network.vision(batch.images))[1]


def listed(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[real].tolist() for row, real in zip(ids, mask, strict=True)]


def plain_scores(network: Any, batch: Any, candidates: list[list[int]]) -> Tensor:
    """log-probability [B, M] of all tokens of every answer after [CLS]."""
    rows = []
    texts = listed(batch.input_ids, batch.attention_mask)
    for context, question in zip(contexts(network, batch), texts, strict=True):
        for answer in candidates:
            log_p = plain_logits(network, context, question, answer)[:-1].log_softmax(-1)
            rows.append(log_p.gather(1, torch.tensor(answer[1:])[:, None]).sum())
    return torch.stack(rows).view(len(batch.images), -1)


@pytest.mark.parametrize("options", STYLES, ids=str)
def test_answer_loss_is_that_of_one_text_for_each_answer(options: dict) -> None:
    model, batch = small_vqa(**options), answer_batch()
    plain_model = copy.deepcopy(model)
    loss = model(batch, alpha=0.4).loss
    questions, expected = listed(batch.input_ids, batch.attention_mask), torch.zeros((), dtype=torch.float64)
    student, teacher = (plain_model.backbone, plain_model.momentum_encoder)
    seen, seen_by_teacher = (contexts(network, batch) for network in (student, teacher))
    for number, answer in enumerate(listed(batch.answer_ids, batch.answer_mask)):
        own = int(batch.question[number])
        log_p = plain_logits(student, seen[own], questions[own], answer)[:-1].log_softmax(-1)
        with torch.no_grad():
            soft = plain_logits(teacher, seen_by_teacher[own], questions[own], answer)[:-1].softmax(-1)
        hard = log_p.gather(1, torch.tensor(answer[1:])[:, None]).sum()
        expected = expected - batch.answer_weight[number] * (0.6 * hard + 0.4 * (soft * log_p).sum())
    expected = expected / 6
    torch.testing.assert_close(loss, expected)
    assert_gradients_equal(gradients(loss, model), gradients(expected, plain_model))
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad), "every trained weight has a gradient"


@pytest.mark.parametrize("options", STYLES, ids=str)
def test_questions_share_pictures(options: dict) -> None:
    model, batch = small_vqa(**options).eval(), small_batch(5, dtype=torch.float64)
    assert_pictures_are_shared(model, batch.images, batch.input_ids, batch.attention_mask)


@pytest.mark.parametrize("options", STYLES, ids=str)
@pytest.mark.parametrize("k", [1, 7, 40])
def test_answer_ranking_is_that_of_one_text_for_each_answer(options: dict, k: int) -> None:
    model, batch, (ids, mask) = small_vqa(**options).eval(), small_batch(5, dtype=torch.float64), answers(40)
    questions = model.read_questions(batch.images, batch.input_ids, batch.attention_mask)
    numbers, scores = model.rank(questions, model.list_answers(ids, mask), k=k)
    with torch.no_grad():
        every = plain_scores(model.backbone, batch, listed(ids, mask))
        texts = listed(batch.input_ids, batch.attention_mask)
        first = torch.stack([
            plain_logits(model.backbone, context, text, [SPECIAL.cls])[0]
            for context, text in zip(contexts(model.backbone, batch), texts, strict=True)
        ])  # fmt: skip
    chosen = first[:, ids[:, 1]].topk(k, dim=1).indices
    best = every.gather(1, chosen).sort(dim=1, descending=True)
    torch.testing.assert_close(scores, best.values)
    torch.testing.assert_close(every.gather(1, numbers), best.values)
    assert (every.std(dim=1) > 0.1).all(), "all answers are as probable: the test shows nothing"


def test_generated_answers_are_the_most_probable_next_tokens() -> None:
    model, batch = small_vqa().eval(), small_batch(5, dtype=torch.float64)
    found = model.generate(batch.images, batch.input_ids, batch.attention_mask, max_length=6)
    assert len({tuple(row.tolist()) for row in found}) > 1, "all answers are the same: the test shows nothing"
    with torch.no_grad():
        seen = contexts(model.backbone, batch)
    for row, context, text in zip(found, seen, listed(batch.input_ids, batch.attention_mask), strict=True):
        ids = row.tolist()
        length = ids.index(SPECIAL.sep) + 1 if SPECIAL.sep in ids else len(ids)
        assert ids[length:] == [SPECIAL.pad] * (len(ids) - length) and ids[0] == SPECIAL.cls
        with torch.no_grad():
            logits = plain_logits(model.backbone, context, text, ids[:length])
        assert logits[:-1].argmax(1).tolist() == ids[1:length]


def test_the_order_of_answers_does_not_matter() -> None:
    model, batch = small_vqa().eval(), answer_batch()
    expected = model(batch, alpha=0.0).loss
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    for name in ("answer_ids", "answer_mask", "answer_weight", "question"):
        setattr(batch, name, getattr(batch, name)[order])
    torch.testing.assert_close(model(batch, alpha=0.0).loss, expected)


def test_a_question_is_computed_once_for_all_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = small_vqa().eval(), answer_batch()
    rows = []
    words = model.backbone.text.word.forward
    monkeypatch.setattr(model.backbone.text.word, "forward", lambda ids: rows.append(len(ids)) or words(ids))
    model(batch, alpha=0.0)
    between = int(batch.answer_mask.sum()) - 2 * len(batch.answer_ids)  # without [CLS] and the last [SEP]
    assert rows == [int(batch.attention_mask.sum()) + between]


def test_activation_checkpointing_changes_nothing() -> None:
    batch, plain, model = answer_batch(), small_vqa(), small_vqa()
    model.set_activation_checkpointing(True)
    expected = gradients(plain(batch, alpha=0.4).loss, plain)
    assert_gradients_equal(gradients(model(batch, alpha=0.4).loss, model), expected)
