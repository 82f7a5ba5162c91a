"""Questions with answers for small models, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softmask.batch import AnswerBatch
from tests.support.model_fixtures import SPECIAL, VOCABULARY, small_batch


def answers(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers of 1 to 4 tokens between [CLS] and [SEP]; several begin with the same token."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, 7, (count,), generator=generator)
    ids = torch.randint(4, VOCABULARY, (count, 6), generator=generator)
    ids[:, 1] = ids[:, 1] % 7 + 4
    mask = torch.arange(6) < lengths[:, None]
    ids[:, 0] = SPECIAL.cls
    ids.scatter_(1, lengths[:, None] - 1, SPECIAL.sep)
    return ids.where(mask, SPECIAL.pad), mask


def answer_batch() -> AnswerBatch:
    ids, mask = answers(9)
    question = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5])
    weight = torch.tensor([0.6, 0.4, 1.0, 0.5, 0.3, 0.2, 0.5, 1.0, 0.9], dtype=torch.float64)
    batch = small_batch(6, dtype=torch.float64)
    return AnswerBatch(
        **vars(batch), answer_ids=ids, answer_mask=mask, answer_weight=weight, question=question,
        num_answer_tokens=int(mask.sum()),
    )  # fmt: skip


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_equal(ours: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-8, atol=1e-10, msg=name)


def assert_pictures_are_shared(model: Any, images: Tensor, *texts: Tensor) -> None:
    """Questions about the same picture equal those about copies of it."""
    picture = torch.tensor([1, 0, 1, 1, 2])
    shared = model.read_questions(images[:3], *texts, picture=picture)
    copies = model.read_questions(images[picture], *texts)
    torch.testing.assert_close(model.first_token(shared), model.first_token(copies))
    written = model.generate(images[:3], *texts, picture=picture, max_length=4)
    assert torch.equal(written, model.generate(images[picture], *texts, max_length=4))
