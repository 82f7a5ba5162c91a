"""A window of optimizer steps recorded by torch.profiler: `train.profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from softmask.files import write_atomically
from softmask.training.config import ProfileConfig
from softmask.training.logs import say


class StepProfiler:
    """Records the window of `options`, counted from optimizer step `step` on, and writes it to `folder`.

    A context around the training loop, which calls `advance` after every optimizer step. If the run ends within the
    window, the steps recorded so far are written. Without a window it does nothing.
    """

    def __init__(self, options: ProfileConfig, folder: Path, *, step: int) -> None:
        self._options, self._folder = options, folder
        self._first = step + options.start + 1
        self._done = 0
        self._written = False
        self._profiler: profile | None = None

    def __enter__(self) -> StepProfiler:
        start, steps = self._options.start, self._options.steps
        if steps:
            self._profiler = profile(
                activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()],
                # The profiler's own start-up falls into the step before the window, if there is one.
                schedule=schedule(wait=max(start - 1, 0), warmup=min(start, 1), active=steps, repeat=1),
                on_trace_ready=self._write,
            )
            self._profiler.start()
        return self

    def advance(self) -> None:
        """Count an optimizer step."""
        if self._profiler is None:
            return
        self._done += 1
        self._profiler.step()
        if self._written:
            self._stop()

    def __exit__(self, *_: Any) -> None:
        if self._profiler is None:
            return
        self._stop()
        if not self._written:
            say(f"profile  nothing recorded: the run ended before optimizer step {self._first} (train.profile.start)")

    def _stop(self) -> None:
        """Also frees the events, which may take as much memory as a model."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _write(self, profiler: profile) -> None:
        steps = min(self._done - self._options.start, self._options.steps)
        self._written = True
        self._folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(self._folder / "trace.json"))
        by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        write_atomically(self._folder / "table.txt", profiler.key_averages().table(sort_by=by, row_limit=-1) + "\n")
        say(f"profile  {steps} optimizer steps from step {self._first} on: {self._folder}/trace.json and table.txt")
