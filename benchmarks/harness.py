"""Measures the time and memory of an op beside its baselines and its floor, after comparing their values.

Runs are interleaved, and ratios are taken within a turn, so a machine that slows down for a while slows all of them
alike. Results are medians.
"""

from __future__ import annotations

import csv
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

TURNS = (7, 40)  # minimum, maximum
SECONDS = 6.0  # no new turn starts after this time
# Tolerance relative to the largest value: fp32 sums thousands of products in another order; bf16 results are rounded.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
MIB = 2**20
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = {"cpu": "cpp", "cuda": "triton"}[DEVICE]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Run:
    """`forward()` and, if there are `leaves`, the gradients of its result for `upstream` (default: of its sum)."""

    forward: Callable[[], Tensor]
    leaves: Sequence[Tensor] = ()
    upstream: Tensor | None = None

    def __call__(self) -> list[Tensor]:
        out = self.forward()
        return [out.detach(), *self.backward(out)]

    def backward(self, out: Tensor) -> Sequence[Tensor]:
        if not self.leaves:
            return ()
        return torch.autograd.grad(out if self.upstream is not None else out.sum(), self.leaves, self.upstream)


@dataclass
class Bench:
    """One op at one size.

    The floor is the work that no implementation avoids; one call of `floor()` does 1 / `floor_times` of it.
    """

    ours: Run
    baselines: dict[str, Run]
    floor: Callable[[], object]
    floor_name: str
    floor_times: float = 1.0


@dataclass
class Result:
    """A row of the table: the median time, and median ratios within a turn."""

    op: str
    dtype: str
    size: str
    milliseconds: float
    floor: str
    over_floor: float
    forward_mib: float
    backward_mib: float
    baselines: dict[str, float] = field(default_factory=dict)  # time over ours, by name


def check_values(bench: Bench) -> None:
    """Compares the values and gradients of every baseline with ours.

    Raises:
        AssertionError: a difference of more than AGREEMENT times the largest value.
    """
    ours, agreement = bench.ours(), AGREEMENT[torch.get_default_dtype()]
    for name, run in bench.baselines.items():
        for position, (got, expected) in enumerate(zip(ours, run(), strict=True)):
            assert got.shape == expected.shape, f"{name}: output {position}: {got.shape}, expected {expected.shape}"
            difference = (got.double() - expected.double()).abs().max().item()
            largest = expected.double().abs().max().item()
            assert difference <= agreement * largest, (
                f"{name}: output {position} differs by {difference:.3g}, the largest value is {largest:.3g}"
            )


def seconds(call: Callable[[], object]) -> float:
    start = now()
    result = call()
    elapsed = now() - start
    del result
    return elapsed


def now() -> float:
    """Seconds on the clock, once the device has done what was launched."""
    synchronize()
    return time.perf_counter()


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def interleave(calls: Sequence[Callable[[], object]]) -> list[tuple[float, ...]]:
    """Seconds of every call, turn by turn, after one warm-up turn."""
    for call in calls:
        call()
    turns: list[tuple[float, ...]] = []
    start = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        while len(turns) < TURNS[0] or (len(turns) < TURNS[1] and time.perf_counter() - start < SECONDS):
            turns.append(tuple(seconds(call) for call in calls))
    finally:
        gc.enable()
    return turns


def peak_mib(call: Callable[[], object]) -> float:
    """Peak memory of torch's allocator during the call, results included, above the level before it."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / MIB


def measure(op: str, dtype: str, size: str, bench: Bench) -> Result:
    """Checks values, then measures time and memory."""
    check_values(bench)
    turns = interleave([bench.ours, bench.floor, *bench.baselines.values()])
    over_floor = statistics.median(ours / (bench.floor_times * floor) for ours, floor, *_ in turns)
    ratios = {
        name: statistics.median(turn[2 + position] / turn[0] for turn in turns)
        for position, name in enumerate(bench.baselines)
    }
    out = bench.ours.forward()
    return Result(
        op=op,
        dtype=dtype,
        size=size,
        milliseconds=1e3 * statistics.median(turn[0] for turn in turns),
        floor=bench.floor_name,
        over_floor=over_floor,
        forward_mib=peak_mib(bench.ours.forward),
        backward_mib=peak_mib(lambda: bench.ours.backward(out)),
        baselines=ratios,
    )


@contextmanager
def defaults(dtype: torch.dtype) -> Iterator[None]:
    """Creates new tensors with this dtype on the measured device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            yield
    finally:
        torch.set_default_dtype(before)


def processor() -> str:
    """The name of the measured processor."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def table(results: Sequence[Result]) -> str:
    """The rows as text. A baseline's number is its time over ours: below 1, the baseline is faster."""
    lines = [f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"]
    head = f"{'op':26} {'type':4} {'size':34} {'ms':>9} {'x floor':>8} {'MiB fwd':>8} {'bwd':>7}"
    head += "   baselines, their time over ours"
    lines += [head, "-" * len(head)]
    for r in results:
        against = ", ".join(f"{name} {ratio:.2f}" for name, ratio in r.baselines.items())
        numbers = f"{r.milliseconds:9.2f} {r.over_floor:8.2f} {r.forward_mib:8.1f} {r.backward_mib:7.1f}"
        lines.append(f"{r.op:26} {r.dtype:4} {r.size:34} {numbers}   {against}; floor: {r.floor}")
    return "\n".join(lines)


def write_csv(results: Sequence[Result], path: Path) -> None:
    """One line per op, size and baseline."""
    with path.open("w", newline="", encoding="utf-8") as file:
        columns = [name for name in Result.__dataclass_fields__ if name != "baselines"]
        writer = csv.writer(file)
        writer.writerow(["processor", "threads", "torch", *columns, "baseline", "baseline_over_ours"])
        machine = [processor(), torch.get_num_threads(), torch.__version__]
        for result in results:
            row = asdict(result)
            shared = [f"{row[name]:.4g}" if isinstance(row[name], float) else row[name] for name in columns]
            for name, ratio in result.baselines.items():
                writer.writerow([*machine, *shared, name, f"{ratio:.4g}"])
