"""JSON files of a run, among them a checkpoint's trainer.json, read with every type checked."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softmask.files import write_atomically


class CheckpointError(RuntimeError):
    """A checkpoint or run folder that cannot be used. The message names it."""


@dataclass
class Progress:
    """How far a run has got."""

    step: int = 0  # completed optimizer steps
    micro_batches: int = 0  # consumed by every rank, skipped ones included
    seconds: float = 0.0  # of training, over all resumes
    skipped_samples: int = 0  # unreadable samples that were replaced, over all ranks
    nonfinite: int = 0  # micro-batches and steps skipped because a loss or gradient was not finite


def read_json(path: Path, *needed: str) -> dict[str, Any]:
    """The object in a JSON file of a run.

    Raises:
        CheckpointError: an unreadable file, no JSON object, or a missing key.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    if lacking := [key for key in needed if key not in content]:
        raise CheckpointError(f"{path}: lacks {', '.join(lacking)}: written by another program or an older release")
    return content


def write_json(content: dict[str, Any], path: Path) -> None:
    """Replace a JSON file in one step."""
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """trainer.json of a checkpoint: progress, world_size and, where the trainer wrote it, loss_scale and data.

    Raises:
        CheckpointError: it lacks a key, one has another type, or the step is not that of the folder's name.
    """
    path = checkpoint / "trainer.json"
    numbers = [item.name for item in dataclasses.fields(Progress)]
    state = read_json(path, *numbers, "world_size")
    for name in (*numbers, "world_size"):
        value, kinds = state[name], (int, float) if name == "seconds" else (int,)
        if type(value) not in kinds or not int(name == "world_size") <= value < 1 << 63:
            raise CheckpointError(f"{path}: {name}: expected a number that is not negative, got {value!r:.80}")
    if checkpoint.name != f"step_{state['step']:08d}":
        raise CheckpointError(f"{path}: step: expected that of the folder's name, got {state['step']}")
    _check_section(path, state, "loss_scale", {"value": (int, float), "good_steps": (int,)})
    validation: dict[str, tuple[type, ...]] = {"best_step": (int,), "best_score": (int, float), "without_gain": (int,)}
    _check_section(path, state, "validation", validation)
    _check_section(path, state, "data", {"captions": (int,), "pictures": (int,), "digest": (str,)})
    return state


def _check_section(path: Path, state: dict[str, Any], name: str, keys: dict[str, tuple[type, ...]]) -> None:
    section = state.get(name)
    if section is None:
        return
    right = isinstance(section, dict) and all(type(section.get(key)) in kinds for key, kinds in keys.items())
    if not right:
        raise CheckpointError(f"{path}: {name}: expected {', '.join(keys)}, got {section!r:.80}")
