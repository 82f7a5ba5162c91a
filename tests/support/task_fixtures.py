"""Small files of downstream tasks, and a pre-trained run that they start from."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from PIL import Image

from softmask.finetuning.finetune import train_and_validate
from softmask.training.config import Config, load_config
from tests.support.train_fixtures import COLOURS, make_config, make_sycoca_config, run_here

YAML = """
output: {output}
init: {init}
task: {task}
seed: 3
train: {{steps: 4, batch_size: 8, checkpoint_every: 0, log_every: 1}}
optimizer: {{lr: 1e-3, min_lr: 1e-4, warmup_steps: 2}}
data: {{train: {data}}}
"""


def write_pictures(folder: Path, *, count: int = 24) -> list[tuple[str, str, str]]:
    """Two-coloured pictures: (file name, colour of the box, colour of the paper)."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, written = random.Random(1), []
    for number in range(count):
        box, paper = rng.sample(sorted(COLOURS), 2)
        image = Image.new("RGB", (32, 32), COLOURS[paper])
        image.paste(COLOURS[box], (rng.randrange(12), rng.randrange(12), 28, 28))
        image.save(folder / f"{number}.png")
        written.append((f"{number}.png", box, paper))
    return written


def write_snli_ve(path: Path, *, count: int = 24) -> Path:
    """ALBEF's list, beside its pictures."""
    rng, entries = random.Random(2), []
    for name, box, paper in write_pictures(path.parent, count=count):
        label = rng.choice(("entailment", "neutral", "contradiction"))
        named = {"entailment": box, "contradiction": paper}.get(label)
        text = f"a {named} box" if named else "a box on paper"
        entries.append({"image": name, "sentence": text, "label": label})
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def write_nlvr2(path: Path, *, count: int = 24) -> Path:
    """ALBEF's list, beside its pictures."""
    pictures, rng, entries = write_pictures(path.parent, count=count), random.Random(2), []
    for _ in range(count):
        (left, box, _), (right, other, _) = rng.sample(pictures, 2)
        named = rng.choice((box, other))
        label = "True" if named == box else "False"
        entries.append({"images": [left, right], "sentence": f"a {named} box", "label": label})
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def write_vqa(path: Path, *, count: int = 24) -> Path:
    """ALBEF's list with ten answers or, in every sixth question, Visual Genome's one; beside it answer_list.json."""
    entries = []
    for number, (name, box, paper) in enumerate(write_pictures(path.parent, count=count)):
        asked, answer = (("box", box), ("paper", paper))[number % 2]
        texts = [answer] * 7 + [f"{answer} {asked}"] * 3
        entry = {
            "question_id": 100 + number,
            "question": f"a {asked}",
            "image": name,
            "answer": texts,
            "dataset": "vqa",
        }
        entries.append(entry | ({"answer": answer, "dataset": "vg"} if number % 6 == 5 else {}))
    path.write_text(json.dumps(entries), encoding="utf-8")
    listed = [*COLOURS, *(f"{colour} {thing}" for colour in COLOURS for thing in ("box", "paper"))]
    (path.parent / "answer_list.json").write_text(json.dumps(listed), encoding="utf-8")
    return path


WRITERS = {"snli_ve": write_snli_ve, "nlvr2": write_nlvr2, "vqa": write_vqa}


def write_classification(folder: Path, *, count: int = 24) -> Path:
    """A folder of a subfolder per colour of the box."""
    for name, box, _ in write_pictures(folder / "all", count=count):
        (folder / "by_class" / box).mkdir(parents=True, exist_ok=True)
        (folder / "all" / name).rename(folder / "by_class" / box / name)
    return folder / "by_class"


def pretrained(folder: Path, *, method: str = "softmask_pp") -> Path:
    """A run of two steps in `folder`."""
    make = make_config if method == "softmask_pp" else lambda at, *more: make_sycoca_config(at, "run", *more)
    config = make(folder, "train.steps=2")
    run_here(config)
    return Path(config.output)


def task_config(folder: Path, task: str, data: Any, *overrides: str, init: Path) -> Config:
    """Configuration of a run in `folder`/`task`, from the pre-trained run `init`."""
    path = folder / f"{task}.yaml"
    path.write_text(YAML.format(output=folder / task, init=init, task=task, data=data), encoding="utf-8")
    return load_config(path, overrides)


def finetune_here(config: Config, *, checkpoint: Path | None = None) -> None:
    train_and_validate(config, checkpoint=checkpoint)
