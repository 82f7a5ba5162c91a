"""benchmarks/gpu/host.py times every op without running its kernels."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import host
from softmask import ops
from softmask.kernels._launch import hooked
from tests.support import kernel_cases as cases

pytestmark = cases.needs_triton
LAUNCHES = {"soft_mask": 1, "soft_mask_attention": 1, "momentum_contrastive_loss": 3, "masked_patch_loss": 1}


def test_every_op_has_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(host, "CALLS", 1)
    monkeypatch.setattr(host, "ROUNDS", 1)
    assert host.main() == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "| op | microseconds | calls of F.layer_norm |"
    measured = {
        name.strip(): [float(one) for one in numbers] for _, name, *numbers, _ in (row.split("|") for row in rows)
    }
    assert set(measured) == {name for name in ops.__all__ if name.islower()}
    assert all(min(numbers) > 0 for numbers in measured.values())


def test_calls_reach_the_launchers_with_gradients() -> None:
    for name, call in host.calls().items():
        seen: list[object] = []
        with host.softmask.backend("triton"), hooked(seen.append, architecture=90):
            out = call()
        assert len(seen) == LAUNCHES.get(name, 2)
        assert out.requires_grad == (name not in ("word_attention", "attentive_mask"))
        assert out.dtype in (torch.float32, torch.bool)
