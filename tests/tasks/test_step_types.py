"""The types in which a training step of each method multiplies under bf16 autocast."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import softmask
from tests.support.kernel_cases import needs_cpp
from tests.support.model_fixtures import small_batch, small_model, small_sycoca

HALF = torch.bfloat16
# Positions of the arguments that each op multiplies.
OPERANDS = {
    "word_attention": (0, 1, 3, 4),
    "soft_mask_attention": (0, 1, 2),
    "soft_mask_attention_backward": (0, 1, 2, 3),
    "contrastive": (0, 1),
    "contrastive_backward": (2, 3),
    "momentum_contrastive": (0, 1, 2, 3),
    "attentive_mask": (0, 1),
}


class Products(TorchDispatchMode):
    """Counts (op, types that it multiplies)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, tuple[torch.dtype, ...]]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0].removeprefix("triton_")
        if func.namespace == "softmask" and name in OPERANDS:
            given = [args[i] for i in OPERANDS[name] if args[i] is not None]
            self.seen[name, tuple(sorted({one.dtype for one in given}, key=str))] += 1
        elif func.namespace == "aten" and (name in ("mm", "bmm", "addmm", "baddbmm") or "attention" in name):
            given = [one for one in args if isinstance(one, Tensor) and one.is_floating_point() and one.dim() in (2, 4)]
            given = given[:4] if "attention" in name else given  # the others are sums of exponentials
            self.seen[name, tuple(sorted({one.dtype for one in given}, key=str))] += 1
        return func(*args, **(kwargs or {}))


def products(model: torch.nn.Module, backend: str) -> dict[str, set[torch.dtype]]:
    batch = small_batch()
    with softmask.backend(backend), Products() as record:
        with torch.autocast("cpu", dtype=HALF):
            output = model(batch)
        output.loss.backward()
    found: dict[str, set[torch.dtype]] = {}
    for name, dtypes in record.seen:
        found.setdefault(name, set()).update(dtypes)
    return found


@needs_cpp
@pytest.mark.parametrize("method", ["softmask_pp", "sycoca"])
def test_autocast_step_multiplies_in_bf16(method: str) -> None:
    """Queries, keys and values stay bf16 beside an fp32 bias. Normalized features are fp32, as the losses require."""
    model = (small_model() if method == "softmask_pp" else small_sycoca()).float()
    found = products(model, "cpp")
    losses = {name: found.pop(name) for name in list(found) if "contrastive" in name}
    ours = {"word_attention", "soft_mask_attention"} if method == "softmask_pp" else {"attentive_mask"}
    assert ours <= found.keys() and {"mm", "addmm"} <= found.keys() and losses
    for name, dtypes in found.items():
        assert dtypes == {HALF}, name
    assert all(dtypes == {torch.float32} for dtypes in losses.values())
