"""Evaluate a run: `python train/evaluate.py RUN --data SHARDS`."""

import sys

from softmask.cli import run

if __name__ == "__main__":
    sys.exit(run("evaluate"))
