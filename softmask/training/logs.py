"""Output of a run: header, progress bar (plain lines without a terminal), log.jsonl, events.jsonl and TensorBoard.

Only rank 0 writes.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from softmask.files import write_atomically

NOT_SHOWN = ("step", "epoch", "lr", "temperature", "samples_per_second", "seconds")  # not printed on the console


class RunLog:
    """The logs of a run. On resuming after `step` steps, what the interrupted run wrote beyond that is removed."""

    def __init__(self, run: Path, *, step: int, steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.steps = steps
        for name in ("log.jsonl", "events.jsonl"):
            cut_back(run / name, step)
        self._rows = (run / "log.jsonl").open("a", encoding="utf-8")
        self._events = (run / "events.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self._last_row = (step, time.monotonic())
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, smoothing=0.05)

    def advance(self) -> None:
        """Count an optimizer step."""
        if self._bar is not None:
            self._bar.update()

    def row(self, row: dict[str, Any]) -> None:
        """Log a step."""
        _write_line(self._rows, row)
        for name, value in row.items():
            if name not in ("step", "seconds"):
                self._board.add_scalar(f"train/{name}", value, row["step"])
        shown = {name: f"{value:.3f}" for name, value in row.items() if name not in NOT_SHOWN}
        rate = f"{row['samples_per_second']:.0f}"
        if self._bar is not None:
            self._bar.set_postfix(shown | {"samples/s": rate})
            return
        terms = "  ".join(f"{name} {value}" for name, value in shown.items())
        say(f"step {row['step']}/{self.steps}  {terms}  {rate} samples/s  {self._time_left(row['step'])} left")

    def event(self, kind: str, text: str, **fields: Any) -> None:
        """Report something unusual: a printed line and an object in events.jsonl. `fields` must include `step`."""
        self.note(kind, **fields)
        say(f"{kind}: {text}")

    def note(self, kind: str, **fields: Any) -> None:
        """Write only the object in events.jsonl, for what has been printed already."""
        _write_line(self._events, {"event": kind, **fields})

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._rows.close()
        self._events.close()
        self._board.close()

    def _time_left(self, step: int) -> str:
        """From the pace since the last row: steps take longer after contrast_steps."""
        last, then = self._last_row
        self._last_row = (step, time.monotonic())
        return clock((self._last_row[1] - then) / max(step - last, 1) * (self.steps - step))


def say(text: str) -> None:
    """Print a line on stderr without breaking the progress bar."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every complete line with its JSON object; remains of a kill or a full disk are skipped."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if line.endswith("\n") and isinstance(content, dict) and isinstance(content.get("step"), int):
            found.append((line, content))
    return found


def cut_back(path: Path, step: int) -> None:
    """Remove the JSON lines of `path` after `step`, and incomplete lines."""
    if not path.exists():
        return
    kept = [line for line, content in read_lines(path) if content["step"] <= step]
    write_atomically(path, "".join(kept))


def _write_line(file: TextIO, content: dict[str, Any]) -> None:
    file.write(json.dumps(content) + "\n")
    file.flush()
