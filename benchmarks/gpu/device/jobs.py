"""A part of `make gpu` in a process of its own, because a fault of a kernel ends its process's use of the device."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.gpu.device.record import Deadline, Record, Row

ROOT = Path(__file__).resolve().parents[3]
GRACE = 30.0  # seconds that a case may take beyond its job's time
Size = Literal["small", "real"]


@dataclass
class Job:
    """What a part measures, and where its rows go. `size` small: for a CPU."""

    record: Record
    deadline: Deadline
    size: Size
    only: str  # the part's subject, such as an op

    @property
    def folder(self) -> Path:
        return self.record.path.parent


def main(measure: Callable[[Job], None]) -> None:
    """The command line of a part: OUT SECONDS SIZE [SUBJECT]."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("size", choices=("small", "real"))
    parser.add_argument("only", nargs="?", default="")
    chosen = parser.parse_args()
    measure(Job(Record(chosen.out), Deadline(chosen.seconds), chosen.size, chosen.only))


@dataclass(frozen=True)
class Part:
    """A module of this folder, and its subject."""

    module: str
    only: str = ""

    @property
    def name(self) -> str:
        return "_".join(filter(None, (self.module, self.only)))

    def run(self, folder: Path, *, seconds: float, size: Size) -> Row | None:
        """Runs the part to its end, at most GRACE beyond its time. Returns how it failed, else None."""
        rows = folder / f"{self.name}.json"
        rows.unlink(missing_ok=True)  # of an earlier run
        module = f"benchmarks.gpu.device.{self.module}"
        command = [sys.executable, "-m", module, str(rows), f"{seconds:.0f}", size, self.only]
        try:
            status, _ = run_bounded(command, seconds=seconds + GRACE)
        except subprocess.TimeoutExpired:
            return {"part": self.name, "error": f"stopped after {seconds + GRACE:.0f} s"}
        return {"part": self.name, "error": f"exit status {status}"} if status else None


def run_bounded(command: Sequence[str], *, seconds: float, quiet: bool = False) -> tuple[int, str]:
    """Runs a command at the root of the repository. Returns its exit status and, if `quiet`, what it printed.

    Raises:
        TimeoutExpired: it took longer; it and the processes that it started are killed.
    """
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if quiet else {}
    with subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, **output) as process:
        try:
            printed, _ = process.communicate(timeout=seconds)
        except BaseException:  # Ctrl-C does not reach another session
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, printed or ""
