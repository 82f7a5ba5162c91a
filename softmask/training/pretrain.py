"""Pre-train SoftMask++, ALBEF, SyCoCa or CoCa.

    deepspeed train/pretrain.py --config train/configs/demo.yaml [--resume auto] [train.steps=1000 ...]
    python train/pretrain.py --config ...        the same in one process

A known failure prints one line and exits with 2. On SIGTERM and Ctrl-C the run writes a checkpoint and every rank
exits with 0. The deepspeed launcher forwards a SIGTERM that is sent to its process group (as batch systems do), not one
sent only to its own process; it gives the ranks 30 seconds and exits with 1 itself. Runs on several machines need
`output` on a shared disk.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from softmask import BackendError
from softmask.data import DataError
from softmask.training.checkpoint.state import CheckpointError, read_json
from softmask.training.checkpoint.store import complete_checkpoints, config_differences, find_checkpoint, step_of
from softmask.training.config import PRETRAIN, Config, ConfigError, load_config
from softmask.training.failures import explain
from softmask.training.launchers import check_environment, complete_environment
from softmask.training.logs import say
from softmask.training.run_folder import FirstRankError
from softmask.training.trainer import TrainingError, train

DESCRIPTION = "Pre-train SoftMask++, ALBEF, SyCoCa or CoCa with DeepSpeed."
SMALLER = "lower train.batch_size and raise train.accumulation, or set train.activation_checkpointing"


class TrainFunction(Protocol):
    def __call__(self, config: Config, *, checkpoint: Path | None = None) -> object: ...


def parse_arguments(arguments: list[str] | None = None, *, description: str = DESCRIPTION) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, help="YAML or JSON file")
    parser.add_argument(
        "--resume",
        default="none",
        help="none: start a new run; auto: resume from the newest checkpoint of the run's folder, if any; "
        "or the checkpoint or run folder to resume from",
    )
    # Passed by deepspeed; the environment has it too, with every launcher.
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.steps=1000")
    return parser.parse_intermixed_args(arguments)


def choose_checkpoint(config: Config, resume: str) -> Path | None:
    """The checkpoint to resume from, None for a new run.

    Raises:
        CheckpointError: no such checkpoint, or a run in the folder would be overwritten.
    """
    run = Path(config.output)
    own = complete_checkpoints(run)
    if resume == "auto":
        return own[-1] if own else None
    if resume == "none":
        traces = [name for name in ("config.yaml", "log.jsonl", "checkpoints") if (run / name).exists()]
        if traces:
            raise CheckpointError(
                f"{run}: holds a run already ({', '.join(traces)}); use --resume auto or choose another output"
            )
        return None
    chosen = find_checkpoint(resume)
    newest = own[-1] if own else None
    if newest is not None and newest.resolve() != chosen.resolve():
        raise CheckpointError(
            f"{run}: holds {newest.name}, which starting from {chosen} would overwrite (step {step_of(chosen)}); "
            "use --resume auto or choose another output"
        )
    return chosen


def already_done(config: Config) -> str | None:
    """The message for a run that is finished, None for any other."""
    run = Path(config.output)
    if not (run / "done.json").is_file():
        return None
    saved, done = load_config(run / "config.yaml"), read_json(run / "done.json", "steps")
    differences = config_differences(saved, config)
    if differences:
        raise CheckpointError(f"{run}: made with another configuration: {', '.join(differences)}")
    lengths = [(one.train.steps, one.train.epochs, one.train.patience) for one in (saved, config)]
    same_length = lengths[0] == lengths[1]
    return f"done: {run} is finished, {done['steps']} steps" if same_length else None


def pretrain(config: Config, *, checkpoint: Path | None = None) -> None:
    """As `trainer.train`. Raises ConfigError for a task after pre-training."""
    if config.task != PRETRAIN:
        raise ConfigError(f"task: expected {PRETRAIN}, got {config.task}: use train/finetune.py")
    train(config, checkpoint=checkpoint)


def run(arguments: list[str] | None, *, train: TrainFunction, description: str) -> None:
    options = parse_arguments(arguments, description=description)
    check_environment()
    complete_environment()
    if not is_first_rank():
        # All ranks open the same data; only rank 0 reports its problems.
        logging.getLogger("softmask.data").setLevel(logging.ERROR)
    config = load_config(options.config, options.overrides)
    if options.resume == "auto" and (message := already_done(config)):
        if is_first_rank():
            say(message)
        return
    train(config, checkpoint=choose_checkpoint(config, options.resume))
    dist.destroy_process_group()


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def main(arguments: list[str] | None = None, *, train: TrainFunction = pretrain, description: str = DESCRIPTION) -> int:
    """The command line of a program that trains. Returns the exit status."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # from libraries; users cannot act on them
    try:
        run(arguments, train=train, description=description)
    except (ConfigError, DataError, CheckpointError, TrainingError, BackendError) as error:
        say(f"error{_where()}: {error}")
        return 2
    except FirstRankError:
        return 2
    except OSError as error:  # a full or read-only disk, a file that vanished
        where = f"{error.filename}: " if error.filename else ""
        say(f"error: {where}{error.strerror or error}")
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except Exception as error:
        if (line := explain(error, smaller=SMALLER)) is None:
            raise
        say(f"error{_where()}: {line}")
        return 2
    return 0


def _where() -> str:
    return "" if is_first_rank() else f" (rank {os.environ['RANK']})"


if __name__ == "__main__":
    sys.exit(main())
