"""Weights to begin a new run with: those of another run, whose pictures may have had another size."""

from __future__ import annotations

from pathlib import Path

from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from softmask.train.checkpoint import CheckpointError, find_checkpoint
from softmask.train.resharding import read_weights

POSITIONS = "vision.vit.pos_embed"
QUEUE = "contrast."
QUEUE_IDS = "contrast.queue_ids"


def start_from(model: nn.Module, path: str | Path) -> None:
    """Copy the weights of a run or checkpoint, momentum twin and queue included, into a new model.

    Position embeddings of another grid are interpolated; a queue of another length is left as it is. The queue's ids
    are forgotten: they number the pictures of that run's data, and the same numbers stand for others in this one's.

    Raises:
        CheckpointError: no checkpoint there, or one of another model.
    """
    checkpoint = find_checkpoint(path)
    own, given = model.state_dict(), read_weights(checkpoint)
    options = {"new_size": list(model.patch_grid), "num_prefix_tokens": model.num_prefix_tokens}
    for name, tensor in own.items():
        if name.endswith(POSITIONS) and name in given and given[name].shape != tensor.shape:
            given[name] = resample_abs_pos_embed(given[name], **options)
        foreign = name not in given or given[name].shape != tensor.shape or name == QUEUE_IDS
        if name.startswith(QUEUE) and foreign:
            given[name] = tensor
    problems = [_difference(name, own.get(name), given.get(name)) for name in sorted(own.keys() | given.keys())]
    if found := [problem for problem in problems if problem]:
        raise CheckpointError(f"{checkpoint}: not the model of this configuration, {len(found)} differ: {found[0]}")
    model.load_state_dict(given)


def _difference(name: str, own: Tensor | None, given: Tensor | None) -> str | None:
    if own is None or given is None:
        return f"{name} is {'not wanted' if own is None else 'missing'}"
    if own.shape != given.shape:
        return f"{name} has shape {tuple(given.shape)}, expected {tuple(own.shape)}"
    return None
