"""An op and its baselines at every size of benchmarks/ops, each by itself, so that one that fails is a row.

python -m benchmarks.gpu.device.ops OUT SECONDS SIZE OP
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

from torch import Tensor

from benchmarks import harness
from benchmarks.gpu.device.jobs import Job, main
from benchmarks.gpu.device.record import Row
from benchmarks.gpu.device.timing import times

OPS = (
    "word_attention",
    "soft_mask",
    "soft_mask_attention",
    "momentum_contrastive",
    "contrastive",
    "attentive_mask",
    "masked_patch_loss",
)
OURS, FLOOR = "softmask", "floor"


def measure(job: Job) -> None:
    module = importlib.import_module(f"benchmarks.ops.bench_{job.only}")
    cases = module.SMALL if job.size == "small" else module.CASES
    for dtype in ("bf16", "fp32"):
        for size, make in cases.items():
            with harness.defaults(harness.DTYPES[dtype]):
                measure_case(job, {"op": job.only, "size": size, "dtype": dtype}, make)


def measure_case(job: Job, names: Row, make: Callable[[], harness.Bench]) -> None:
    """A row for each side of a case."""
    case = Case(make)
    add = partial(job.record.case, deadline=job.deadline, **names)
    add(case.of_ours, run=OURS)
    if case.bench is None:
        return
    for name, run in case.bench.baselines.items():
        add(partial(case.of_baseline, run), optional=True, run=name)
    add(case.of_floor, run=FLOOR)


class Case:
    """A benchmark's case, made by the first row."""

    def __init__(self, make: Callable[[], harness.Bench]) -> None:
        self._make, self._ours = make, None
        self.bench: harness.Bench | None = None

    def of_ours(self) -> Row:
        self.bench = self._make()
        self._ours = self.bench.ours()
        return of_run(self.bench.ours)

    def of_baseline(self, run: harness.Run) -> Row:
        row = {} if self._ours is None else {"differs": difference(run(), self._ours)}
        return row | of_run(run)

    def of_floor(self) -> Row:
        return times(self.bench.floor) | {"times": self.bench.floor_times, "what": self.bench.floor_name}


def of_run(run: harness.Run) -> Row:
    return times(run) | {"peak_mib": harness.peak_mib(run)}


def difference(found: list[Tensor], truth: list[Tensor]) -> float:
    """The largest distance of a result or a gradient from ours, relative to ours."""
    pairs = ((one.double(), other.double()) for one, other in zip(found, truth, strict=True))
    return max(((one - other).norm() / other.norm().clamp_min(1e-30)).item() for one, other in pairs)


if __name__ == "__main__":
    main(measure)
