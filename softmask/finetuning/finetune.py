"""Train a task after pre-training: retrieval, VQA, text assignment, NLVR2, SNLI-VE, captioning or classification.

    deepspeed train/finetune.py --config train/configs/snli_ve.yaml init=runs/mine data.train=... [--resume auto] [...]
    python train/finetune.py --config ...        the same in one process

The configuration takes from `init`, a pre-trained run, what it does not set itself: the method, the model, and how
texts and pictures are read. Everything else is as in pretrain.py. With `data.val` the task's metric is measured every
`train.validate_every` steps, and the best checkpoint is kept beside the last ones.
"""

from __future__ import annotations

import sys
from pathlib import Path

from softmask.finetuning.measure import validator
from softmask.tasks.downstream import DownstreamTask
from softmask.tasks.registry import known
from softmask.training import pretrain
from softmask.training.config import PRETRAIN, Config, ConfigError
from softmask.training.trainer import train


def train_and_validate(config: Config, *, checkpoint: Path | None = None) -> None:
    """As `training.trainer.train`, for a task after pre-training.

    Raises:
        ConfigError: the configuration names no such task, or one without training.
    """
    if config.task == PRETRAIN:
        raise ConfigError(f"task: expected {', '.join(known(DownstreamTask))}, got {PRETRAIN}: use train/pretrain.py")
    task = config.find_task()
    assert isinstance(task, DownstreamTask)
    if not task.section:
        measured = f"python train/evaluate.py {config.init or 'RUN'} --task {config.task}"
        raise ConfigError(f"task: {config.task} has nothing to train: {measured} measures a pre-trained run")
    train(config, checkpoint=checkpoint, validator=validator)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    return pretrain.main(arguments, train=train_and_validate, description="Train a task after pre-training.")


if __name__ == "__main__":
    sys.exit(main())
