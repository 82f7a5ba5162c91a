"""Studies whose commands are replaced, and their metrics and tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.ablation.rows import SEEN, STUDIES, UNSEEN
from benchmarks.studies.runs import Plan, Run
from softmask.data import train_wordpiece
from softmask.training.checkpoint import initial
from softmask.training.checkpoint.store import build_model
from softmask.training.config import load_config, save_config

SYCOCA, SOFTMASK_PP = ALONE = tuple(
    replace(study, rows=tuple(replace(row, init="", init_heads=()) for row in study.rows))
    for study in STUDIES
    if study.shown
)
"""The ablation's tables, whose runs start from random weights here."""

STEPS = load_config(SYCOCA.config).train.steps


def made_metrics(*, itc: float = 0.5, itm: float = 0.5, pointing: float = 0.5, steps: int = STEPS, images: int = 256):
    """metrics.json in which all recalls of a stage are equal, without its test data."""
    stages = {name: {way: dict.fromkeys(("r1", "r5", "r10"), share) for way in ("i2t", "t2i")}
              for name, share in (("itc", itc), ("itm", itm))}  # fmt: skip
    return {
        "retrieval": {"images": images, **stages},
        "grounding": {"pointing": pointing},
        "training": {"steps": steps},
    }


def measured_of(unseen: dict, seen: dict | None = None) -> dict[str, dict]:
    return {UNSEEN: unseen, SEEN: seen or made_metrics()}


def assert_starts(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's model takes the weights of the run that it starts from. Both are built without memory."""
    assert run.base is not None
    tokenizer = train_wordpiece(["a box"], folder / "tokenizer", vocab_size=64)
    models = []
    for config in (run.base.config, run.config):
        if hasattr(config.head, "names"):
            config.head.names = ["box", "owl"]
        with torch.device("meta"):
            models.append(build_model(config, tokenizer))
    monkeypatch.setattr(initial, "find_checkpoint", Path)
    monkeypatch.setattr(initial, "read_weights", lambda _path: models[0].state_dict())
    found = initial.start_from(models[1], "start", heads=run.config.init_heads, task=run.config.find_task())
    assert "tensors of start" in found


class Fake:
    """Replaces the two commands: writes the files they would write, and records the calls."""

    def __init__(self, *, stops: int = 0, steps: int = STEPS) -> None:
        self.calls: list[str] = []
        self.stops = stops  # number of trainings that end early
        self.metrics = made_metrics(steps=steps)

    def __call__(self, command: Sequence[str]) -> None:
        (script,) = [word for word in command if word.endswith(".py")]
        self.calls.append(Path(script).stem)
        if script.endswith("evaluate.py"):
            run, data, output = (command[command.index(word) + 1] for word in (script, "--data", "--output"))
            self.evaluate(Path(run), data, Path(output))
        else:
            self.train(command[command.index("--config") + 1], command[command.index("auto") + 1 :])

    def evaluate(self, run: Path, data: str, output: Path) -> None:
        output.write_text(json.dumps(self.metrics | {"evaluation": {"data": data}}))

    def train(self, config: str, overrides: Sequence[str]) -> None:
        (output,) = [word.removeprefix("output=") for word in overrides if word.startswith("output=")]
        Path(output).mkdir(parents=True, exist_ok=True)
        save_config(load_config(config, overrides), Path(output) / "config.yaml")
        if self.stops:
            self.stops -= 1
        else:
            (Path(output) / "done.json").write_text("{}")


def make_plan(folder: Path, *rows: str, **options) -> Plan:
    places = {"runs": folder / "runs", "record": folder / "record", "table": folder / "ablation.md"}
    return Plan(**{"studies": ALONE, "rows": rows, "seeds": 5, "expected": 5} | places | options)


def line_of(text: str, title: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {title} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]
