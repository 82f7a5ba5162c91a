"""Command-line code that evaluation and report share: options, loading of model and data, output."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from softmask import BackendError
from softmask.arguments import count, positive
from softmask.data import DataError
from softmask.evaluation import ranks
from softmask.evaluation.readers import GalleryPlace, Reader, Scorer, is_model
from softmask.tasks.base import Split
from softmask.training.checkpoint.state import CheckpointError
from softmask.training.checkpoint.store import load_model, longest_text
from softmask.training.config import PRETRAIN, ConfigError
from softmask.training.failures import explain
from softmask.training.launchers import check_environment
from softmask.training.run_folder import check_vocabulary, first_captions

SIZES = ("batch_size", "text_length", "image_size", "resize", "gallery")
Resize = Literal["", "squash", "crop"]
"""How images become square, whole or cut to their middle; "" takes `data.eval_resize`."""


def load_scorer(
    checkpoint: Path,
    *,
    batch_size: int,
    text_length: int = 0,
    image_size: int = 0,
    resize: Resize = "",
    gallery: GalleryPlace = "device",
) -> Scorer:
    """The checkpoint's model, on the GPU if present. 0 and "" keep the values of training."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any
    model, tokenizer, config = load_model(checkpoint, device=device, image_size=image_size)
    if config.task == PRETRAIN and not is_model(model):
        needed = "encode_image, encode_text and patch_grid"
        raise ConfigError(f"{config.method}: {type(model).__name__} lacks one of {needed}, which evaluation needs")
    longest, what = longest_text(config)
    least = 2 + config.data.append_sep
    if not least <= (length := text_length or config.data.max_length) <= longest:
        raise ConfigError(f"--text-length: expected {least} to {longest} ({what}), got {length}")
    config.data.max_length = length
    config.data.eval_resize = resize or config.data.eval_resize
    return Scorer(model, tokenizer, config, device=device, batch_size=batch_size, gallery=gallery)


def sizes(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `load_scorer` among the command line's."""
    return {name: getattr(options, name) for name in SIZES}


def open_reader(scorer: Scorer, data: str, image_root: str | None = None, *, split: Split = "test") -> Reader:
    """Opens shards or a list; `image_root` is the folder of the list's images, None the one of training. `split`: of a
    file that holds several."""
    root = scorer.config.data.image_root if image_root is None else image_root
    read = replace(scorer.config.data, image_root=root)
    source = scorer.config.find_task().open(data, read, split=split)
    try:
        check_vocabulary(scorer.tokenizer, first_captions(scorer.config, source))
    except ValueError as error:
        raise DataError(f"{data}: {error}") from error
    return Reader(source, scorer.config.data)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that select data and sizes."""
    parser.add_argument("--data", required=True, help="glob or brace pattern of shards, or a JSON list")
    parser.add_argument(
        "--image-root", help="folder of a JSON list's images; '': the list's own (default: as in training)"
    )
    parser.add_argument(
        "--split",
        choices=get_args(Split),
        default="test",
        help="of a file that holds several, as Karpathy's (default test)",
    )
    parser.add_argument("--text-length", type=count, default=0, help="tokens per caption; 0: as in training (default)")
    parser.add_argument("--image-size", type=count, default=0, help="side of images, px; 0: as in training (default)")
    parser.add_argument(
        "--resize",
        choices=("squash", "crop"),
        default="",
        help="squash whole images to a square, or crop their middle (default: data.eval_resize, set by the method)",
    )
    parser.add_argument("--answer-list", type=Path, help="VQA's answers to choose from (default: as in training)")
    parser.add_argument(
        "--batch-size", type=positive, default=64, help="images, captions, beams or pairs per batch (default 64)"
    )
    parser.add_argument(
        "--gallery",
        choices=get_args(GalleryPlace),
        default="device",
        help="where images and captions wait for re-ranking: with the model (default), or, larger galleries, on the "
        "host in half precision",
    )


def use_answer_list(options: argparse.Namespace, scorer: Scorer) -> None:
    """Puts `--answer-list` into the configuration.

    Raises:
        ConfigError: the run is of another task, which has no such list.
    """
    if options.answer_list and scorer.config.task != "vqa":
        raise ConfigError(f"--answer-list: expected a run of task vqa, got {scorer.config.task}")
    if options.answer_list:
        scorer.config.head.answer_list = str(options.answer_list)


def evaluation_facts(scorer: Scorer, reader: Reader, checkpoint: Path) -> dict:
    """What was evaluated and at which sizes, so that a report can check that it shows the same."""
    data = scorer.config.data
    read = {"text_length": data.max_length, "image_size": data.image_size, "resize": data.eval_resize}
    state = hashlib.sha256((checkpoint / "trainer.json").read_bytes()).hexdigest()
    return {"checkpoint": checkpoint.name, "trainer": state, "digest": reader.source.digest, **read}


def check_output(path: Path, ending: str, *, option: str = "--output") -> None:
    """Checks, before any work, that the file can be written and that an existing one may be replaced.

    Raises:
        OSError: the folder is missing or not writable, or the path is a folder or a file of another kind.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option}: no folder {str(path.parent)!r}")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{option}: cannot write into {str(path.parent)!r}")
    if path.is_dir():
        raise IsADirectoryError(f"{option}: expected a file, got the folder {str(path)!r}")
    if path.exists() and not (path.is_file() and path.name.endswith(ending)):
        raise FileExistsError(f"{option}: {str(path)!r} exists and is not a {ending} file; choose another name")


def name_skipped(reader: Reader) -> None:
    """Names unreadable samples and the first unusable object on stderr, once for all ranks."""
    if ranks.rank():
        return
    for _, line in sorted(reader.skipped.items()):
        print(f"left out: {line}", file=sys.stderr)
    for where, reason in list(reader.bad_objects.items())[:1]:
        count = len(reader.bad_objects)
        print(f"left out: {count} unusable objects, the first: {where}: {reason}", file=sys.stderr)


def finish(name: str, work: Callable[[], str], *, smaller: str) -> int:
    """Runs a command's work and prints its result, or one line for a known error. Returns the exit status."""
    try:
        check_environment()
        ranks.start()
        said = work()
    except (DataError, CheckpointError, ConfigError, BackendError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if (line := explain(error, smaller=smaller)) is None:
            raise
        print(f"{name}: {line}", file=sys.stderr)
        return 1
    if ranks.rank() == 0:
        show(said)
    return 0


def show(text: str) -> None:
    """Prints to stdout unless its reader is gone."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
