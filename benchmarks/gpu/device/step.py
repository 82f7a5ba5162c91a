"""A training step at the published size in bf16: this library's kernels, its reference backend, and the plain recipe.

python -m benchmarks.gpu.device.step OUT SECONDS SIZE METHOD
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import softmask
from benchmarks import harness
from benchmarks.gpu.device.jobs import Job, main
from benchmarks.gpu.device.record import Row
from benchmarks.step.bench_step import CONFIGS, METHODS, Stepper, make_steppers
from benchmarks.step.cases import make_case
from softmask.files import write_atomically
from softmask.training.config import load_config

BATCH = {"small": 2, "real": 64}
SHARED = (
    "data.image_size=32",
    "model.vision.name=conv_vit",
    "model.vision.patch_size=0",
    "model.vision.image_size=32",
    "model.vision.conv_vit.width=24",
    "model.vision.conv_vit.depth=1",
    "model.text.width=32",
    "model.text.heads=4",
    "model.embed_dim=16",
)
SMALL = {
    "softmask_pp": (
        "model.text.intermediate_size=64",
        "model.text.text_layers=1",
        "model.text.fusion_layers=2",
        "model.cam_layer=0",
    ),
    "sycoca": (
        "model.text.layers=1",
        "model.text.decoder_layers=1",
        "model.image_decoder_layers=1",
        "model.image_decoder_heads=2",
    ),
}
SIDES = {"kernels": ("softmask", "auto"), "reference": ("softmask", "reference"), "plain": ("plain", "auto")}
STEPS = {"small": 1, "real": 10}
LISTED = 40  # kernels of a profile
assert SMALL.keys() == METHODS.keys()


def measure(job: Job) -> None:
    method, batch = job.only, BATCH[job.size]
    overrides = [*SHARED, *SMALL[method]] if job.size == "small" else []
    config = load_config(CONFIGS / METHODS[method], overrides).model
    with torch.device(harness.DEVICE):
        case = make_case(config, batch)
    steppers = make_steppers(case, bf16=True)
    for side, (name, backend) in SIDES.items():
        with softmask.backend(backend):
            names = {"method": method, "side": side, "batch": batch}
            one = partial(measured, steppers[name], steps=STEPS[job.size], listing=f"profile_{method}_{side}.txt")
            job.record.case(partial(one, job.folder), deadline=job.deadline, **names)


def measured(stepper: Stepper, folder: Path, *, steps: int, listing: str) -> Row:
    """The losses, milliseconds of a whole step and of its named parts, and the peak memory. The slowest kernels go to
    the file `listing`."""
    stepper()
    losses = {name: float(loss) for name, loss in losses_of(stepper).items()}
    whole = statistics.median(harness.seconds(stepper) for _ in range(steps))
    parts = [stepper.seconds() for _ in range(max(1, steps // 2))]
    by_part = {name: 1e3 * statistics.median(one.get(name, 0.0) for one in parts) for name in parts[0]}
    write_atomically(folder / listing, slowest_kernels(stepper))
    return {"step_ms": 1e3 * whole, "peak_mib": harness.peak_mib(stepper), "losses": losses, "parts_ms": by_part}


def losses_of(stepper: Stepper) -> dict[str, Tensor]:
    with torch.autocast(harness.DEVICE, torch.bfloat16):
        return {name: loss.detach() for name, loss in stepper.side.losses().items()}


def slowest_kernels(stepper: Stepper) -> str:
    devices = [ProfilerActivity.CUDA] if harness.DEVICE == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *devices]) as profiler:
        stepper()
        harness.synchronize()
    key = f"self_{harness.DEVICE}_time_total"
    return profiler.key_averages().table(sort_by=key, row_limit=LISTED, max_name_column_width=80)


if __name__ == "__main__":
    main(measure)
