"""Initial weights and vocabulary: from another run, which may have had another image size, from files, or random."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor, nn

from softmask.data import CaptionTokenizer, Source
from softmask.tasks.base import Task
from softmask.training.checkpoint.reshard import read_weights
from softmask.training.checkpoint.state import CheckpointError
from softmask.training.checkpoint.store import UNREADABLE, find_checkpoint, first_line, fit_positions
from softmask.training.config import Config
from softmask.training.run_folder import first_captions

QUEUE = "contrast."
QUEUE_IDS = "contrast.queue_ids"


def weights_from(model: nn.Module, config: Config, checkpoint: Path | None) -> str:
    """Load `config.init`, if it is set, into a new model; describes the origin of the weights in words.

    Raises:
        CheckpointError: as `start_from`.
    """
    if checkpoint is not None:
        return f"of {checkpoint}"
    if config.init:
        return start_from(model, config.init, heads=config.init_heads, task=config.find_task())
    origins = config.find_task().weight_origins(model)
    if set(origins.values()) <= {"random"}:
        return "random"
    return "; ".join([*(f"{part}: {origin}" for part, origin in origins.items()), "all others random"])


def words_from(tokenizer: CaptionTokenizer, config: Config, checkpoint: Path | None) -> str:
    """The size and origin of the vocabulary, in words."""
    trained = "a WordPiece trained on the captions"
    origin = "the checkpoint" if checkpoint is not None else config.data.tokenizer or config.init or trained
    return f"{tokenizer.vocab_size:,} tokens of {origin}"


def text_facts(tokenizer: CaptionTokenizer, config: Config, source: Source) -> str:
    """How texts are read, and how many are too long, in words: the first ones are counted."""
    data, captions = config.data, first_captions(config, source)
    cut = int(tokenizer(captions, **data.reading).cut.sum())
    parts = [f"{data.max_length} tokens at most, which cuts {cut:,} of the first {len(captions):,} texts"]
    parts += ["cleaned as in ALBEF"] * data.clean_captions + ["without [SEP]"] * (not data.append_sep)
    parts += ["one caption per image and epoch"] * (data.captions == "random")
    parts += config.find_task().text_facts(source, tokenizer)
    return "; ".join(parts)


def start_from(model: nn.Module, path: str | Path, *, heads: Sequence[str] = (), task: Task | None = None) -> str:
    """Copy the weights of a run or checkpoint, momentum encoder and queue included, into a new model.

    Position embeddings of another grid are interpolated; a queue of another length stays new. The queue's ids are
    dropped: they number the images of the other run's data. `heads`: starts of parameter names that the checkpoint may
    lack, have in another shape, or have beyond this model; they keep their new values or are left out. `task` says
    which of the tensors its model takes, and which of its own parts are new.
    Returns what was done, in words.

    Raises:
        CheckpointError: no checkpoint, a checkpoint of another model, or a head that neither has.
    """
    checkpoint = find_checkpoint(path)
    try:
        own, all_given = model.state_dict(), read_weights(checkpoint)
    except UNREADABLE as error:
        raise CheckpointError(f"init: {checkpoint} cannot be read: {first_line(error)}") from error
    _check_heads(heads, own.keys() | all_given.keys())
    given = dict(all_given if task is None else task.initial_weights(all_given))
    used = {id(tensor) for tensor in given.values()}
    done = [f"{part} left out" for part in _parts(name for name in all_given if id(all_given[name]) not in used)]
    done += [f"{name} interpolated" for name in fit_positions(model, given)]
    new_parts = [*heads, *(task.new_parts if task else ())]
    new: list[str] = []
    for name, tensor in own.items():
        differs = name not in given or given[name].shape != tensor.shape
        if differs and _is_in(name, new_parts) or name.startswith(QUEUE) and (differs or name == QUEUE_IDS):
            given[name] = tensor
            new.append(name)
    beyond = [name for name in given if name not in own and _is_in(name, new_parts)]
    for name in beyond:
        del given[name]
    done += [f"{part} new" for part in _parts(new)] + [f"{part} left out" for part in _parts(beyond)]
    problems = [_difference(name, own.get(name), given.get(name)) for name in sorted(own.keys() | given.keys())]
    if found := [problem for problem in problems if problem]:
        hint = "; init_heads names parts that may differ"
        raise CheckpointError(
            f"{checkpoint}: not the model of this configuration, {len(found)} differ: {found[0]}{hint}"
        )
    model.load_state_dict(given)
    return ", ".join([f"{len(given) - len(new)} tensors of {checkpoint}", *done])


def _parts(names: Iterable[str]) -> list[str]:
    """The parts of a model that parameters belong to, by the first two words of their names."""
    return list(dict.fromkeys(".".join(name.split(".")[:2]) for name in sorted(names)))


def _is_in(name: str, heads: Sequence[str]) -> bool:
    """Whether a parameter is part of a head; the momentum encoder's copy belongs to the same head."""
    name = name.replace("momentum_encoder.", "backbone.", 1) if name.startswith("momentum_encoder.") else name
    return any(f"{name}.".startswith(f"{head}.") for head in heads)


def _check_heads(heads: Sequence[str], names: Iterable[str]) -> None:
    for head in heads:
        if not any(_is_in(name, [head]) for name in names):
            known = sorted(
                {".".join(name.split(".")[:2]) for name in names if not name.startswith("momentum_encoder.")}
            )
            raise CheckpointError(f"init_heads: no parameter's name starts with {head!r}, but with {', '.join(known)}")


def _difference(name: str, own: Tensor | None, given: Tensor | None) -> str | None:
    if own is None or given is None:
        return f"{name} is {'not expected' if own is None else 'missing'}"
    if own.shape != given.shape:
        return f"{name} has shape {tuple(given.shape)}, expected {tuple(own.shape)}"
    return None
