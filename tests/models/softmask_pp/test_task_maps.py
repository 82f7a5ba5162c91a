"""Maps of the words of a question or statement over each picture, against a materialized Grad-CAM."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.step.plain_softmask_pp import AttentionMap
from benchmarks.step.plain_tasks import PlainTasks
from softmask.models.config import Distillation, VqaHead
from softmask.models.softmask_pp.classifier import Nlvr2, SnliVe
from softmask.models.softmask_pp.vqa import Vqa
from tests.support.model_fixtures import SPECIAL, small_batch, small_config

KINDS = {SnliVe: (Distillation(alpha=0.0), 1), Nlvr2: (Distillation(alpha=0.0), 2), Vqa: (VqaHead(alpha=0.0), 1)}
WORDS = torch.tensor([[[1, 2], [3, -1], [-1, -1]]]).expand(6, -1, -1)


def model_and_inputs(kind: type) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """A model with weights larger than at initialization, and images, input_ids and attention_mask of six texts."""
    torch.manual_seed(0)
    head, pictures = KINDS[kind]
    model = kind(small_config(), head, special_ids=SPECIAL)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(4.0) if parameter.ndim > 1 else parameter.normal_(std=0.1)
    batch = small_batch(6, dtype=torch.float64)
    images = torch.randn(6 * pictures, 3, 32, 32, dtype=torch.float64)
    return model.double(), (images, batch.input_ids, batch.attention_mask)


def gradcam(attention: AttentionMap, *, prefix: int) -> torch.Tensor:
    """A * relu(dS/dA) of WORDS, mean over heads and sub-tokens: [6, 3, patches]."""
    cam = (attention.values * attention.gradient.clamp_min(0)).mean(1)[:, :, prefix:]
    return torch.stack([cam[:, 1:3].mean(1), cam[:, 3], torch.zeros_like(cam[:, 3])], dim=1).detach()


def maps_of(model: Any, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    with torch.no_grad():
        maps = model.word_maps_by_picture(*inputs, WORDS, normalize=None)
    assert not maps.requires_grad and all(p.grad is None for p in model.parameters())
    return maps


@pytest.mark.parametrize("kind", [SnliVe, Nlvr2])
def test_maps_of_a_classifier_explain_the_largest_logit(kind: type) -> None:
    model, inputs = model_and_inputs(kind)
    maps, layer = maps_of(model, inputs), model.config.cam_layer * kind.pictures
    saved = {layer + picture: AttentionMap() for picture in range(kind.pictures)}
    PlainTasks(model).classify(*inputs, into=saved).amax(1).sum().backward()
    expected = [gradcam(one, prefix=model.num_prefix_tokens) for one in saved.values()]
    torch.testing.assert_close(maps, torch.stack(expected, dim=1))
    assert all((one[:, :2] > 0).any() for one in expected)


def test_maps_of_vqa_explain_the_first_token_of_an_answer() -> None:
    model, inputs = model_and_inputs(Vqa)
    maps, plain, saved = maps_of(model, inputs), PlainTasks(model), AttentionMap()
    states = plain.question(model.backbone, *inputs, saved)
    start = torch.full((6, 1), SPECIAL.cls)
    logits = plain.answer_logits(model.backbone, start, start > 0, states, inputs[-1])[:, 0]
    logits.log_softmax(1).amax(1).sum().backward()
    expected = gradcam(saved, prefix=model.num_prefix_tokens)
    torch.testing.assert_close(maps, expected[:, None])
    assert (expected[:, :2] > 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_maps_of_frozen_models_are_the_same(kind: type) -> None:
    model, inputs = model_and_inputs(kind)
    maps = maps_of(model, inputs)
    assert torch.equal(maps, maps_of(model.requires_grad_(False), inputs))
