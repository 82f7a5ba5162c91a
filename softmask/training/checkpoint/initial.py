"""Where a run's weights and vocabulary come from: another run, whose images may have had another size, files, or
nowhere; and the words that say so."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from softmask.data import CaptionTokenizer, Source
from softmask.training.checkpoint.reshard import read_weights
from softmask.training.checkpoint.state import CheckpointError
from softmask.training.checkpoint.store import UNREADABLE, find_checkpoint, first_line, fit_positions
from softmask.training.config import Config
from softmask.training.run_folder import first_captions

QUEUE = "contrast."
QUEUE_IDS = "contrast.queue_ids"


def weights_from(model: nn.Module, config: Config, checkpoint: Path | None) -> str:
    """Fill a new model from `config.init`, where there is one; what its weights are, in words.

    Raises:
        CheckpointError: as `start_from`.
    """
    if checkpoint is not None:
        return f"of {checkpoint}"
    if config.init:
        return start_from(model, config.init)
    parts = {"vision": "weights_from", "text": "text_from"}
    found = {part: getattr(m, name) for part, name in parts.items() for m in model.modules() if hasattr(m, name)}
    if set(found.values()) == {"random"}:
        return "random"
    return "; ".join([*(f"{part}: {origin}" for part, origin in found.items()), "all others random"])


def words_from(tokenizer: CaptionTokenizer, config: Config, checkpoint: Path | None) -> str:
    """The size of the vocabulary and where it comes from, in words."""
    trained = "a WordPiece trained on the captions"
    origin = "the checkpoint" if checkpoint is not None else config.data.tokenizer or config.init or trained
    return f"{tokenizer.vocab_size:,} tokens of {origin}"


def text_facts(tokenizer: CaptionTokenizer, config: Config, source: Source) -> str:
    """How captions are read and how many are too long, by the first of them, in words."""
    data, captions = config.data, first_captions(config, source)
    cut = int(tokenizer(captions, **data.reading).cut.sum())
    parts = [f"{data.max_length} tokens at most, {cut:,} of the first {len(captions):,} captions are cut there"]
    parts += ["cleaned as ALBEF's"] * data.clean_captions + ["without [SEP]"] * (not data.append_sep)
    parts += ["one of an image's an epoch"] * (data.captions == "random")
    return "; ".join(parts)


def start_from(model: nn.Module, path: str | Path) -> str:
    """Copy the weights of a run or checkpoint, momentum encoder and queue included, into a new model.

    Position embeddings of another grid are interpolated; a queue of another length is left as it is. The queue's ids
    are forgotten: they number the images of that run's data, and the same numbers stand for others in this one's.
    Returns what was done, in words.

    Raises:
        CheckpointError: no checkpoint there, or one of another model.
    """
    checkpoint = find_checkpoint(path)
    try:
        own, given = model.state_dict(), read_weights(checkpoint)
    except UNREADABLE as error:
        raise CheckpointError(f"init: {checkpoint} cannot be read: {first_line(error)}") from error
    changed = [f"{name} interpolated" for name in fit_positions(model, given)]
    for name, tensor in own.items():
        foreign = name not in given or given[name].shape != tensor.shape or name == QUEUE_IDS
        if name.startswith(QUEUE) and foreign:
            given[name] = tensor
            changed.append(f"{name} new")
    problems = [_difference(name, own.get(name), given.get(name)) for name in sorted(own.keys() | given.keys())]
    if found := [problem for problem in problems if problem]:
        raise CheckpointError(f"{checkpoint}: not the model of this configuration, {len(found)} differ: {found[0]}")
    model.load_state_dict(given)
    return ", ".join([f"{len(given)} tensors of {checkpoint}", *changed])


def _difference(name: str, own: Tensor | None, given: Tensor | None) -> str | None:
    if own is None or given is None:
        return f"{name} is {'not wanted' if own is None else 'missing'}"
    if own.shape != given.shape:
        return f"{name} has shape {tuple(given.shape)}, expected {tuple(own.shape)}"
    return None
