"""Train a task after pre-training: `deepspeed train/finetune.py --config FILE [key=value ...]`."""

import sys

from softmask.cli import run

if __name__ == "__main__":
    sys.exit(run("finetune"))
