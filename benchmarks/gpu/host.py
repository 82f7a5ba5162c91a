"""What an op costs the host: the time of a call whose launches are left out, in calls of F.layer_norm.

    TRITON_INTERPRET=1 OMP_NUM_THREADS=1 python -m benchmarks.gpu.host

Eager calls on a GPU are bound by the host while their kernels are shorter than this. Arguments are small CPU tensors
that need gradients, as in training. A call of F.layer_norm on such tensors, measured in turn with the op's, stands for
the host's speed. What Triton's launcher itself takes is left out.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import softmask
from softmask import ops
from softmask.kernels._launch import hooked
from softmask.ops import _checks

CALLS = 100  # per measurement
ROUNDS = 60
ARCHITECTURE = 90  # whose configurations the launchers look up
Call = Callable[[], Tensor]


def calls() -> dict[str, Call]:
    """A call of every op, as in training."""
    features, maps = torch.randn(2, 9, 8, requires_grad=True), torch.rand(2, 8)
    image, text = (F.normalize(torch.randn(4, 8), dim=-1).requires_grad_() for _ in range(2))
    scale = torch.tensor(10.0, requires_grad=True)
    teachers = {"image_teacher": image.detach(), "text_teacher": text.detach()}
    queues = {name: F.normalize(torch.randn(16, 8), dim=-1) for name in ("image_queue", "text_queue")}
    query, key = torch.randn(2, 2, 3, 8, requires_grad=True), torch.randn(2, 2, 9, 8, requires_grad=True)
    words = query.detach(), key.detach(), torch.zeros(2, 1, dtype=torch.int64)
    output = torch.randn(2, 2, 3, 8)
    prediction, pictures = torch.randn(2, 4, 12, requires_grad=True), torch.randn(2, 3, 4, 4)
    masked = torch.tensor([[True, False, True, False]] * 2)
    return {
        "word_attention": lambda: ops.word_attention(*words, value=words[1], grad_output=output),
        "soft_mask": lambda: ops.soft_mask(features, maps),
        "soft_mask_attention": lambda: ops.soft_mask_attention(query, key, key),
        "focal_contrastive_loss": lambda: ops.focal_contrastive_loss(image, text, scale, gamma=2.0),
        "momentum_contrastive_loss": lambda: ops.momentum_contrastive_loss(
            image, text, scale, **teachers, **queues, alpha=0.4
        ),
        "attentive_mask": lambda: ops.attentive_mask(features.detach(), features.detach(), ratio=0.5),
        "masked_patch_loss": lambda: ops.masked_patch_loss(prediction, pictures, masked, patch_size=2),
    }


def _seconds(call: Callable[[], object]) -> float:
    begin = time.process_time()
    for _ in range(CALLS):
        call()
    return (time.process_time() - begin) / CALLS


def measure() -> dict[str, tuple[float, float]]:
    """Op -> (microseconds of a forward call, calls of F.layer_norm in that time): medians of ROUNDS measurements."""
    row, weight = torch.randn(2, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    measured = {}
    as_on_a_gpu = patch.object(_checks, "has_values", lambda tensor: False)  # whose values are not checked
    with as_on_a_gpu, hooked(lambda one: None, architecture=ARCHITECTURE), softmask.backend("triton"):
        for name, call in calls().items():
            call()
            pairs = [(_seconds(call), _seconds(lambda: F.layer_norm(row, (8,), weight, weight))) for _ in range(ROUNDS)]
            measured[name] = (1e6 * median(op for op, _ in pairs), median(op / norm for op, norm in pairs))
    return measured


def main() -> int:
    print(f"| op | microseconds | calls of F.layer_norm |\n|---|{2 * '---:|'}")
    for name, (microseconds, norms) in measure().items():
        print(f"| {name} | {microseconds:.1f} | {norms:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
