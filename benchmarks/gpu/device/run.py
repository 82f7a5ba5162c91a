"""`make gpu`: everything that a GPU can tell about this library, in one command that no single failure ends.

    python -m benchmarks.gpu.device.run [--minutes 24] [--phases correct bench step] [--out FOLDER] [--small]

It needs torch, Triton, numpy, timm, transformers and pytest; other packages are compared with where they are installed.
Every part runs in a process of its own and writes its rows after every case: files of a few KiB, and a page of tables
made from them. `--small` runs the same parts at tiny sizes, also on a CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import harness
from benchmarks.gpu.device.jobs import ROOT, Part, Size
from benchmarks.gpu.device.ops import OPS
from benchmarks.gpu.device.page import failures, write_page
from benchmarks.gpu.device.record import Deadline, Record
from benchmarks.step.bench_step import METHODS

PHASES = {
    "correct": (Part("environment"), Part("correct")),
    "bench": (Part("kernels"), *(Part("ops", op) for op in OPS)),
    "step": tuple(Part("step", method) for method in METHODS),
}
SHARES = {"correct": 7, "bench": 9, "step": 8}  # of the time
assert PHASES.keys() == SHARES.keys()


def run_phases(folder: Path, phases: Sequence[str], *, minutes: float, size: Size) -> None:
    """Runs the parts of every phase within its share of the time; parts share what is left of it."""
    record = Record(folder / "run.json")
    whole = sum(SHARES[phase] for phase in phases)
    for phase in phases:
        deadline = Deadline(60 * minutes * SHARES[phase] / whole)
        for position, part in enumerate(PHASES[phase]):
            start = time.monotonic()
            seconds = max(1.0, deadline.left() / (len(PHASES[phase]) - position))
            failure = part.run(folder, seconds=seconds, size=size)
            record.add({"part": part.name, "seconds": round(time.monotonic() - start, 1), **(failure or {})})
            write_page(folder)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 1 if a part or a case failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float(sum(SHARES.values())), help="of all phases together")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of the files")
    parser.add_argument("--small", action="store_true", help="tiny sizes, also on a CPU")
    chosen = parser.parse_args(argv)
    if harness.DEVICE != "cuda" and not chosen.small:
        parser.error("no CUDA device; --small runs tiny sizes on the CPU")
    chosen.out.mkdir(parents=True, exist_ok=True)
    run_phases(chosen.out, chosen.phases, minutes=chosen.minutes, size="small" if chosen.small else "real")
    failed = failures(chosen.out)
    print(f"gpu: {len(failed)} cases failed; tables: {chosen.out / 'page.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
