"""The full-size configurations of tasks after pre-training make real steps on the CPU: seconds a step, and peak memory.

    python -m benchmarks.step.full_size [--task vqa --task nlvr2] [--steps 3] [--batch 2]

Pictures and texts are the embedded ones (`python -m softmask.data.scenes --tasks --out data/tasks`, and data/scenes),
enlarged to the configuration's size. Tasks start from a run of one step of softmask_base or sycoca_base, from random
weights, with a vocabulary of BERT's size. Everything is written to a temporary folder and removed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks import harness
from softmask.arguments import positive
from softmask.training.logs import read_lines

ROOT = Path(__file__).resolve().parents[2]
CAPTIONS = ("data.train=data/tasks/captions.json",)
QUESTIONS = ("data.train=data/tasks/vqa_train_*.json", "head.answer_list=data/tasks/answer_list.json")
TASKS: dict[str, tuple[str, tuple[str, ...]]] = {  # configuration -> the run that it starts from, its data
    "retrieval": ("softmask_base", (*CAPTIONS, "model.queue_size=0")),
    "vqa": ("softmask_base", QUESTIONS),
    "text_assignment": ("softmask_base", ("data.train=data/scenes/train-000000.tar",)),
    "nlvr2": ("softmask_base", ("data.train=data/tasks/nlvr2_train.json",)),
    "snli_ve": ("softmask_base", ("data.train=data/tasks/snli_ve_train.json",)),
    "classification": ("softmask_base", ("data.train=data/tasks/classification/train",)),
    "captioning": ("sycoca_base", CAPTIONS),
    "vqa_sycoca": ("sycoca_base", QUESTIONS),
}
GB = 1e9


@dataclass(frozen=True)
class Measured:
    seconds: list[float]  # of the steps after the first, which also warms up
    peak: int  # bytes


def train(script: str, config: str, folder: Path, *overrides: str, steps: int, batch: int) -> Measured:
    """Runs a script of train/ with a configuration.

    Raises:
        SystemExit: the command failed; its messages stand above.
    """
    options = (
        f"output={folder}", f"train.steps={steps}", "train.epochs=0", f"train.batch_size={batch}",
        "train.precision=fp32", "train.checkpoint_every=0", "train.log_every=1", "data.val=", "data.workers=0",
        "optimizer.warmup_steps=0",
    )  # fmt: skip
    command = [sys.executable, str(ROOT / "train" / script), "--config", config, *options, *overrides]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{said}\n{config}: {script} failed")
    times = [row["seconds"] for _, row in read_lines(folder / "log.jsonl")]
    return Measured([after - before for before, after in zip(times, times[1:], strict=False)], used.ru_maxrss * 1024)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Real steps of the full-size configurations of tasks, on the CPU.")
    parser.add_argument("--task", choices=TASKS, action="append", help="default: all")
    parser.add_argument("--steps", type=positive, default=3)
    parser.add_argument("--batch", type=positive, default=2)
    options = parser.parse_args(argv)
    print(f"{harness.processor()}, batch {options.batch}, fp32; seconds a step, peak memory")
    with tempfile.TemporaryDirectory() as scratch:
        bases: dict[str, Path] = {}
        for task in options.task or TASKS:
            name, data = TASKS[task]
            if name not in bases:
                bases[name] = Path(scratch, name)
                own = ("data.train=data/scenes/train-000000.tar", "model.text.vocab_size=30522", "model.queue_size=0")
                train("pretrain.py", name, bases[name], *own, "train.accumulation=1", steps=1, batch=2)
            folder, init = Path(scratch, task), f"init={bases[name]}"
            found = train("finetune.py", task, folder, init, *data, steps=options.steps, batch=options.batch)
            steps = ", ".join(f"{seconds:.1f}" for seconds in found.seconds)
            print(f"{task:16s} {steps} s, {found.peak / GB:.1f} GB", flush=True)
            for path in folder.rglob("*.pt"):
                path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
