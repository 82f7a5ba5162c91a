"""Compare this tree with another git revision: do both train, resume and evaluate to the same bits?

    python -m benchmarks.same_bits REVISION --data 'data/scenes/test-*.tar' [--steps 6]

Both methods' demo configurations train for a few steps in one thread of one process, resume halfway, and are evaluated.
The weights, optimizer state, log.jsonl and metrics.json of both trees are compared, except for times. Parameters of an
older release are compared under their current names; keys that only one tree has are listed. The revision is checked
out and built in build/bench.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.revisions import ROOT, built
from softmask.tasks.registry import find_task
from softmask.training.config import load_config

CONFIGURATIONS = ("demo", "sycoca_demo")
TIMES = ("seconds", "samples_per_second")
SMALL = [
    "train.batch_size=8", "train.log_every=1", "train.keep_checkpoints=9",
    "optimizer.warmup_steps=2", "data.workers=0", "data.vocab_size=300",
]  # fmt: skip


def run(tree: Path, output: Path, *, name: str, data: str, steps: int) -> None:
    """Train, resume from the checkpoint at half the steps into another folder, and evaluate the result."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    options = [*SMALL, f"data.train={data}", f"train.steps={steps}", f"train.checkpoint_every={steps // 2}"]
    options += ["model.contrast_steps=1"] if name == "demo" else []
    config = str(tree / "train" / "configs" / f"{name}.yaml")
    half = output / "whole" / "checkpoints" / f"step_{steps // 2:08d}"
    pretrain = [sys.executable, str(tree / "train" / "pretrain.py"), "--config", config, *options]
    for command in (
        [*pretrain, f"output={output / 'whole'}"],
        [*pretrain, f"output={output / 'resumed'}", "--resume", str(half)],
        [sys.executable, str(tree / "train" / "evaluate.py"), str(output / "resumed"), "--data", data, "--pairs", "16",
         "--beams", "2", "--rerank", "4"],
    ):  # fmt: skip
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")


def facts(output: Path, steps: int, *, name_of: Callable[[str], str]) -> Iterator[tuple[str, Any]]:
    """(name, value) of everything that a run writes, except times: tensors, numbers, strings."""
    for kind in ("whole", "resumed"):
        rows = (output / kind / "log.jsonl").read_text().splitlines()
        for row in map(json.loads, rows):
            yield from ((f"{kind} step {row['step']} {key}", value) for key, value in row.items() if key not in TIMES)
        folder = output / kind / "checkpoints" / f"step_{steps:08d}"
        for file in sorted(folder.glob("*.pt")):
            yield from leaves(torch.load(file, weights_only=False, map_location="cpu"), f"{kind} {file.name}", name_of)
    metrics = json.loads((output / "resumed" / "metrics.json").read_text())
    measured = {key: value for key, value in metrics.items() if key not in ("training", "evaluation")}
    yield from leaves(measured, "metrics", str)


def leaves(tree: Any, prefix: str, name_of: Callable[[str], str]) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{prefix} {name_of(key) if isinstance(key, str) else key}", name_of)
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from leaves(value, f"{prefix} {number}", name_of)
    elif isinstance(tree, torch.Tensor | int | float | str | bool):
        yield prefix, name_of(tree) if isinstance(tree, str) else tree


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[str]:
    for name in ours.keys() & theirs.keys():
        one, other = ours[name], theirs[name]
        if isinstance(one, torch.Tensor):
            same = torch.equal(one, other)
        else:
            same = one == other or (one != one and other != other)  # two NaN count as equal
        if not same:
            yield name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision")
    parser.add_argument("--data", required=True, help="shards for training and evaluation of both trees")
    parser.add_argument("--steps", type=int, default=6)
    chosen = parser.parse_args()
    commit, other = built(chosen.revision)
    data, failed = str(Path(chosen.data).absolute()), False
    for name in CONFIGURATIONS:
        found, task = [], find_task(load_config(name, ["output=unused"]).method)
        for label, tree in (("ours", ROOT), (commit[:12], other)):
            output = ROOT / "build" / "same_bits" / name / label
            subprocess.run(["rm", "-rf", str(output)], check=True)
            run(tree, output, name=name, data=data, steps=chosen.steps)
            found.append(dict(facts(output, chosen.steps, name_of=task.current_name)))
        ours, theirs = found
        different = sorted(differences(ours, theirs))
        alone = sorted(ours.keys() ^ theirs.keys())
        print(f"{name}: {len(ours.keys() & theirs.keys())} values compared, {len(different)} differ")
        for key in different[:20]:
            print(f"  differs: {key}")
        for key in alone[:20]:
            print(f"  only in one tree: {key}")
        failed |= bool(different)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
