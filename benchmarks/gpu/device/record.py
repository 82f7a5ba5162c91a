"""The files of `make gpu`: a row per case, written after every case, so that whatever ends a run loses one case."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from softmask import kernels
from softmask.files import write_atomically

LONGEST = 400  # characters of an error
NO_TIME = "no time left"
Row = dict[str, Any]


@dataclass
class Deadline:
    """Seconds until a job should stop starting cases."""

    seconds: float
    start: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)


@dataclass
class Record:
    """Rows in a JSON file."""

    path: Path
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        write_atomically(self.path, as_json(self.rows))
        print(self.path.stem, *(f"{key}={_short(value)}" for key, value in row.items()), flush=True)

    def case(self, measure: Callable[[], Row], *, deadline: Deadline, optional: bool = False, **names: object) -> None:
        """Adds the row that `measure()` gives, or what it raised: ImportError skips an `optional` case."""
        row: Row = dict(names)
        if deadline.left() <= 0:
            return self.add(row | {"skipped": NO_TIME})
        try:
            row |= measure()
        except Exception as error:
            skips = optional and isinstance(error, ImportError)
            row["skipped" if skips else "error"] = describe(error)
        self.add(row)


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST]


def as_json(rows: list[Row]) -> str:
    """One row per line, after the versions and the processor."""
    head = {"torch": torch.__version__, "triton": kernels.triton_version(), "processor": harness.processor()}
    lines = ",\n".join(json.dumps(row) for row in rows)
    return json.dumps(head)[:-1] + f', "rows": [\n{lines}\n]}}\n'


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
