"""Train and evaluate the tasks after pre-training beside their baselines, and write benchmarks/downstream/README.md.

    python -m benchmarks.downstream.run [--seeds 3] [--jobs 2] [--rows vqa vqa_text] [--steps 20] [--table-only]

A run is a row with a seed, in runs/downstream/<study>/<row>/seed_<n>. Runs that others start from are trained when they
are needed. The table is built from the record (studies/runs.py), and recorded runs are skipped; options are those of
benchmarks/ablation/run.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.downstream.rows import STUDIES
from benchmarks.studies import command

SEEDS = 3  # per row
INTRODUCTION = """# Tasks after pre-training

Every task of docs/finetuning.md on the embedded scenes (`python -m softmask.data.scenes --tasks`), beside its
baselines. `make downstream` trains and evaluates the rows, keeps the configuration and metrics of every run in
`record/`, and generates this file from them; do not edit it by hand.

"Pre-trained" starts from the run of a demo, "from scratch" from the same model with random weights for as many steps,
"longer" for three times as many, since pre-training takes about twice as long as a task. "Text alone" is trained and
tested on grey pictures. Figures are percentages, CIDEr times 100. All rows run with the seeds 0 to 2. Runs with the
same seed start from the same pre-trained run, and a row is compared with the task's own seed by seed: the mean
difference in points, and its 95 % interval by Student's t. Without a validation the newest checkpoint is evaluated,
else the one that did best on it.
"""
WHOLE = command.whole_plan(Path("benchmarks/downstream"), STUDIES, seeds=SEEDS, introduction=INTRODUCTION)


def main(argv: list[str] | None = None) -> int:
    return command.main(argv, WHOLE, description="Train and evaluate all tasks beside their baselines.")


if __name__ == "__main__":
    sys.exit(main())
