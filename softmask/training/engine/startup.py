"""The process group of a run and the device of a rank."""

from __future__ import annotations

import logging
import os

import torch

from softmask.training.config import ConfigError
from softmask.training.launchers import complete_environment


def start_distributed() -> None:
    """Choose the accelerator, complete the environment and join the process group.

    Must be called before anything imports DeepSpeed.
    """
    choose_accelerator()
    complete_environment()
    if torch.cuda.is_available():
        check_device(int(os.environ["LOCAL_RANK"]), torch.cuda.device_count())
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Otherwise DeepSpeed tries to compile and link all of its ops, with the linker's warnings, and then builds an
    # all-reduce for inference on every CPU machine (40 seconds). Nothing else reads this.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    deepspeed.init_distributed(verbose=False)


def choose_accelerator() -> None:
    """Set DS_ACCELERATOR, which DeepSpeed reads on import, if there is no GPU.

    Raises:
        ConfigError: DS_ACCELERATOR names an accelerator that is not present.
    """
    present = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if (chosen := os.environ.get("DS_ACCELERATOR") or present[0]) not in present:
        raise ConfigError(f"environment: DS_ACCELERATOR: expected {' or '.join(present)} here, got {chosen!r}")


def check_device(local_rank: int, count: int) -> None:
    """Raise ConfigError if there are more ranks than GPUs."""
    if local_rank >= count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        of = f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else ""
        raise ConfigError(
            f"LOCAL_RANK: expected one rank per GPU, below {count}{of}, got {local_rank}; start as many ranks as GPUs"
        )
