"""A training step reads values from the device only by HostInts, so it runs on fake tensors, which have none."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from softmask.data import Batch
from softmask.models import SoftMaskPP, SyCoCa
from softmask.models.layers.packing import Packing
from softmask.models.softmask_pp import model as softmask_pp
from tests.support.model_fixtures import COCA, POOLED, small_batch, small_model, small_sycoca

NUMBERS = {2: [20, 4], 1: [45]}  # masked tokens and the most in a caption; tokens of the hard negatives


class FakeHostInts:
    """HostInts with fixed integers."""

    def __init__(self, *values: Tensor) -> None:
        self.numbers = NUMBERS[len(values)]

    def read(self) -> list[int]:
        return self.numbers


def run_fake_step(model: SoftMaskPP | SyCoCa, batch: Batch) -> None:
    mode = FakeTensorMode()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = mode.from_tensor(parameter.detach())
            module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = mode.from_tensor(buffer)
    given = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    tensors = {name: mode.from_tensor(value) for name, value in given.items() if isinstance(value, Tensor)}
    counts = {  # as the loader gives them
        "num_tokens": int(batch.attention_mask.sum()),
    }
    fake_batch = dataclasses.replace(batch, **tensors, **counts)
    with mode:
        model.update_momentum()
        output = model(fake_batch)
        output.loss.backward()
        model.enqueue(output)
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    with mode, pytest.raises(DataDependentOutputException):
        output.loss.item()  # as would any other read


@pytest.mark.parametrize("mask_text", ["all", "mlm"])
@pytest.mark.parametrize("cam_source", ["online", "recompute", "momentum"])
def test_softmask_step_runs_on_fake_tensors(monkeypatch: pytest.MonkeyPatch, mask_text: str, cam_source: str) -> None:
    monkeypatch.setattr(softmask_pp, "HostInts", FakeHostInts)
    monkeypatch.setattr(Packing, "of", staticmethod(Packing))  # as on a device: the given number of tokens
    run_fake_step(small_model(mask_text=mask_text, cam_source=cam_source), small_batch())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"masks": "random", "caption_ratio": 0.25},
        {"caption_masking": "pixels", "reconstruct_masking": "tokens"},
        {"caption_masking": "pixels", "queue_size": 12} | POOLED,
        COCA,
    ],
    ids=str,
)
def test_sycoca_step_runs_on_fake_tensors(monkeypatch: pytest.MonkeyPatch, options: dict) -> None:
    monkeypatch.setattr(Packing, "of", staticmethod(Packing))
    run_fake_step(small_sycoca(**options), small_batch(dtype=torch.float64))
