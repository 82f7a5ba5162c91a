"""Evaluate a run: `python train/evaluate.py RUN --data SHARDS`."""

import sys

from softmask.evaluation.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
