"""Prepares a run's folder: lock, configuration, tokenizer."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from softmask.data import CaptionTokenizer, DataError, Source, train_wordpiece
from softmask.data.cleaning import plain_words
from softmask.training.checkpoint.state import CheckpointError
from softmask.training.checkpoint.store import check_no_debris, find_checkpoint, step_of
from softmask.training.config import Config, ConfigError, save_config

SAMPLED_CAPTIONS = 1000
MOST_UNKNOWN = 0.5  # largest share of [UNK] among their tokens
_lock: TextIO | None = None  # of the folder that this process writes; open until it ends


class FirstRankError(RuntimeError):
    """Rank 0 failed and has reported why."""


def prepare_run(config: Config, source: Source, checkpoint: Path | None) -> CaptionTokenizer:
    """Write config.yaml and tokenizer/ into the run's folder (rank 0) and load the tokenizer (all ranks).

    Raises:
        ConfigError: the tokenizer cannot be used.
    """
    failed: list[Exception | None] = [None]
    if dist.get_rank() == 0:
        try:
            _prepare(config, source, checkpoint)
        except (ValueError, OSError, DataError, CheckpointError) as error:
            failed = [error]
    dist.broadcast_object_list(failed)
    if failed[0] is not None:
        if dist.get_rank():
            raise FirstRankError("rank 0 could not prepare the run")
        raise failed[0]
    try:
        tokenizer = CaptionTokenizer.load(Path(config.output) / "tokenizer")
    except ValueError as error:
        raise ConfigError(f"data.{error}") from error
    return tokenizer


def _prepare(config: Config, source: Source, checkpoint: Path | None) -> None:
    run = Path(config.output)
    if run.exists() and not run.is_dir():
        raise ConfigError(f"output: expected the folder of the run, got the file {run}")
    run.mkdir(parents=True, exist_ok=True)
    lock(run)
    check_no_debris(run, 0 if checkpoint is None else step_of(checkpoint))
    (run / "done.json").unlink(missing_ok=True)  # of a shorter run that is extended now
    own = checkpoint is not None and checkpoint.resolve().parents[1] == run.resolve()
    try:
        if not own or not (run / "tokenizer").exists():
            _write_tokenizer(config, source, checkpoint)
        tokenizer = CaptionTokenizer.load(run / "tokenizer")
        check_same_words(tokenizer, checkpoint, config)
        check_vocabulary(tokenizer, first_captions(config, source))
    except ValueError as error:
        raise ConfigError(f"data.{error}") from error
    save_config(config, run / "config.yaml")


def lock(run: Path) -> None:
    """Lock the run's folder until this process ends.

    Raises:
        ConfigError: another process holds the lock.
    """
    global _lock
    if _lock is not None:
        _lock.close()
    _lock = (run / ".lock").open("a+", encoding="utf-8")
    try:
        fcntl.lockf(_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: loader workers would inherit it
    except (BlockingIOError, PermissionError):
        _lock.seek(0)
        holder = _lock.read().strip() or "unknown"
        raise ConfigError(f"output: {run} is written by another process ({holder})") from None
    except OSError:  # the file system has no locks
        return
    _lock.truncate(0)
    print(f"process {os.getpid()} of {socket.gethostname()}", file=_lock, flush=True)


def captions_read(config: Config, source: Source) -> Iterator[str]:
    """All captions in order, as the tokenizer reads them."""
    return (plain_words(text).text if config.data.clean_captions else text for text in source.captions())


def first_captions(config: Config, source: Source) -> list[str]:
    return list(islice(captions_read(config, source), SAMPLED_CAPTIONS))


def check_same_words(tokenizer: CaptionTokenizer, checkpoint: Path | None, config: Config) -> None:
    """Raise ValueError if the tokenizer is not that of the weights."""
    if checkpoint is None and not config.init:
        return
    origin = checkpoint if checkpoint is not None else find_checkpoint(config.init)
    if not tokenizer.same_words(CaptionTokenizer.load(origin / "tokenizer")):
        raise ValueError(f"tokenizer: its words are not those that the weights of {origin} were trained with")


def check_vocabulary(tokenizer: CaptionTokenizer, captions: list[str]) -> None:
    """Raise ValueError if the tokenizer does not know the words of the first captions."""
    if (share := tokenizer.unknown(captions)) > MOST_UNKNOWN:
        raise ValueError(
            f"tokenizer: {share:.0%} of the tokens in the first {len(captions)} captions are [UNK], expected at most "
            f"{MOST_UNKNOWN:.0%}: is it the right tokenizer for captions such as {captions[0]!r:.60}?"
        )


def _write_tokenizer(config: Config, source: Source, checkpoint: Path | None) -> None:
    """Write the tokenizer of the checkpoint, the configured one or one trained on the captions, whole or not at all."""
    final = Path(config.output) / "tokenizer"
    partial = final.with_name("tokenizer.tmp")
    given = checkpoint / "tokenizer" if checkpoint is not None else config.data.tokenizer
    if not given and config.init:
        given = find_checkpoint(config.init) / "tokenizer"
    for folder in (partial, final):
        if folder.exists():
            shutil.rmtree(folder)
    if given:
        CaptionTokenizer.load(given).save(partial)
    else:
        train_wordpiece(captions_read(config, source), partial, vocab_size=config.data.vocab_size)
    partial.rename(final)
