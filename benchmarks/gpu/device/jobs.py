"""A part of `make gpu` in a process of its own, because a fault of a kernel ends its process's use of the device."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.gpu.device.record import Deadline, Record, Row

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
        command = [sys.executable, "-m", f"benchmarks.gpu.device.{self.module}", str(folder / f"{self.name}.json")]
        try:
            done = subprocess.run([*command, f"{seconds:.0f}", size, self.only], timeout=seconds + GRACE, check=False)
        except subprocess.TimeoutExpired:
            return {"part": self.name, "error": f"stopped after {seconds + GRACE:.0f} s"}
        return {"part": self.name, "error": f"exit status {done.returncode}"} if done.returncode else None
