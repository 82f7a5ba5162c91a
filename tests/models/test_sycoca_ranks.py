"""Two ranks train SyCoCa as one does: gradients, and the queue of all ranks' features."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from softmask.data import Batch
from tests.support.model_fixtures import SPECIAL, small_batch, small_sycoca
from tests.support.two_ranks import WORLD, average_gradients, own_half, own_rows, run_on_two_ranks

QUEUE = {"queue_size": 16, "momentum": 0.9}


def global_batch() -> Batch:
    """Captions of both halves have equal lengths, since terms are means over a rank's own tokens."""
    batch = small_batch(8, dtype=torch.float64)
    attention_mask = own_half(batch.attention_mask, 0).repeat(WORLD, 1)
    filled = batch.input_ids.masked_fill(batch.input_ids == SPECIAL.pad, 4)
    return dataclasses.replace(
        batch, attention_mask=attention_mask, input_ids=filled.masked_fill(~attention_mask, SPECIAL.pad)
    )


def train_two_steps(batch: Batch, options: dict, *, ranks: int) -> dict[str, Tensor]:
    """Gradients, and the queue if there is one, after two steps without an optimizer."""
    model = small_sycoca(**options)
    for _ in range(2):
        model.update_momentum()
        model.zero_grad()
        output = model(batch)
        output.loss.backward()
        model.enqueue(output)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.grad is not None}
    grads = average_gradients(list(named.values())) if ranks > 1 else [one.grad for one in named.values()]
    found = {f"gradient of {name}": grad for name, grad in zip(named, grads, strict=True)}
    queue = model.contrast.state_dict() if model.contrast is not None else {}
    return found | {f"queue: {name}": value for name, value in queue.items()}


def on_rank(options: dict, rank: int) -> dict[str, Tensor]:
    return train_two_steps(own_rows(global_batch(), rank), options, ranks=WORLD)


@pytest.mark.parametrize("options", [{}, {"gamma": 1.0}, QUEUE], ids=["defaults", "focal", "queue"])
def test_two_ranks_equal_one(tmp_path: Path, options: dict) -> None:
    expected = train_two_steps(global_batch(), options, ranks=1)
    assert any(name.startswith("queue") for name in expected) == ("queue_size" in options)
    for found in run_on_two_ranks(partial(on_rank, options), tmp_path):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")
