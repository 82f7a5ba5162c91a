"""The kernels of every op alone, at the sizes of `make gpu-report`, beside what this device's rates allow.

python -m benchmarks.gpu.device.kernels OUT SECONDS SIZE
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch

from benchmarks import harness
from benchmarks.gpu.cases import CALLS, Call, Size
from benchmarks.gpu.device.jobs import Job, main
from benchmarks.gpu.device.record import Row
from benchmarks.gpu.device.timing import times
from benchmarks.gpu.fast_interpreter import fast_interpreter
from softmask.kernels import INTERPRETED


def measure(job: Job) -> None:
    for name, dtype in {"bf16": torch.bfloat16, "fp32": torch.float32}.items():
        for call in CALLS:
            size = call.small if job.size == "small" else call.size
            names = {"call": call.name, "size": _text(size), "dtype": name}
            job.record.case(partial(measured, call, size, dtype), deadline=job.deadline, **names)


def measured(call: Call, size: Size, dtype: torch.dtype) -> Row:
    """Times, and the fewest bytes and operations of the definition."""
    inputs = call.inputs(size, dtype, harness.DEVICE)
    moved, flops = call.fewest(size, dtype.itemsize)
    return {**times(lambda: call.run(*inputs)), "fewest_bytes": moved, "fewest_flops": flops}


def _text(size: Size) -> str:
    return " ".join(f"{name}{count}" for name, count in size.items())


if __name__ == "__main__":
    with fast_interpreter() if INTERPRETED else nullcontext():
        main(measure)
