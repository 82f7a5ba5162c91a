"""Train and evaluate the rows of both ablations with several seeds, and write benchmarks/ablation/README.md.

    python -m benchmarks.ablation.run [--seeds 5] [--jobs 2] [--rows coca sycoca] [--steps 20] [--table-only]

A run is a row with a seed, in runs/ablation/<method>/<row>/seed_<n>: `deepspeed train/pretrain.py --resume auto` on one
rank, then `train/evaluate.py` on an artist that training never sees and on those of training. The table is built from
the record (studies/runs.py), and recorded runs are skipped. All rows run with the first seed before the next one, and
the table is rewritten after every run. `--jobs` runs go side by side and share the cores. `--steps` is for trials:
their runs, record and table go to runs/ablation_<steps>_steps, and warm-up and the steps of a first phase are shortened
in proportion.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.ablation.rows import STUDIES
from benchmarks.studies import command

SEEDS = 5  # per row
INTRODUCTION = """# Ablation

What each part of the two methods changes where something has to generalize: scenes drawn by five artists in training,
tested on an artist that training never sees and, as "trained", on other scenes by the artists of training. `make
ablation` trains and evaluates the rows, keeps the configuration and metrics of every run in `record/`, and generates
this file from them; do not edit it by hand.

Figures are percentages, CIDEr times 100. mR is the mean of R@1, R@5 and R@10 by ITC, image to caption and caption to
image; R@1 by ITM is the mean of both directions after re-ranking. All rows run with the seeds 0 to 4. Runs with the
same seed start from the same weights and see the same batches, so a row is compared with the row without its part seed
by seed: the mean difference in points, and its 95 % interval by Student's t. The papers trained on millions of images,
a run here trains for minutes on tens of thousands of drawn scenes: an effect that is missing here is not refuted.
"""
WHOLE = command.whole_plan(Path("benchmarks/ablation"), STUDIES, seeds=SEEDS, introduction=INTRODUCTION)


def main(argv: list[str] | None = None) -> int:
    return command.main(
        argv, WHOLE, description="Train and evaluate the rows of both ablations, and write their table."
    )


if __name__ == "__main__":
    sys.exit(main())
