"""What was measured on: packages, properties, and the rates at which this device copies and multiplies.

python -m benchmarks.gpu.device.environment OUT SECONDS SIZE
"""

from __future__ import annotations

import platform
import shutil
from functools import partial

import torch

from benchmarks import harness
from benchmarks.gpu.device.jobs import Job, main
from benchmarks.gpu.device.record import Row
from benchmarks.gpu.device.timing import Call, captured, device_microseconds, times
from softmask.env import PACKAGES, version

PEERS = ("pytest", "flash-attn", "xformers", "inf-cl", "memeff", "cut-cross-entropy", "liger-kernel")
TOOLS = ("nvcc", "compute-sanitizer", "ncu", "g++")
COPIED = {"small": 2**16, "real": 2**30}  # elements of fp32
MULTIPLIED = {"small": 64, "real": 8192}  # rows and columns
COPY = "copy GB/s"


def measure(job: Job) -> None:
    for name in (*PACKAGES, *PEERS):
        job.record.add({"what": name, "value": version(name)})
    for name in TOOLS:
        job.record.add({"what": name, "value": shutil.which(name) is not None})
    job.record.add({"what": "python", "value": platform.python_version()})
    if harness.DEVICE == "cuda":
        job.record.add({"what": "device", "value": str(torch.cuda.get_device_properties(0))})
    job.record.case(partial(copy_rate, COPIED[job.size]), deadline=job.deadline, what=COPY)
    for name, dtype in harness.DTYPES.items():
        rate = partial(product_rate, MULTIPLIED[job.size], dtype)
        job.record.case(rate, deadline=job.deadline, what=product(name))


def copy_rate(elements: int) -> Row:
    source = torch.randn(elements, device=harness.DEVICE)
    to = torch.empty_like(source)
    return {"value": 2 * source.numel() * source.element_size() / seconds(lambda: to.copy_(source)) / 1e9}


def product_rate(size: int, dtype: torch.dtype) -> Row:
    left, right = torch.randn(2, size, size, device=harness.DEVICE).to(dtype)
    return {"value": 2 * size**3 / seconds(lambda: left @ right) / 1e12}


def product(dtype: str) -> str:
    """The name of a matrix product's rate."""
    return f"matmul {dtype} TFLOP/s"


def seconds(call: Call) -> float:
    if harness.DEVICE == "cuda":
        return device_microseconds(captured(call), replays=10) / 1e6
    return times(call)["eager_us"] / 1e6


if __name__ == "__main__":
    main(measure)
