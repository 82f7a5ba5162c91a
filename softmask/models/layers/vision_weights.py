"""Weights of a timm ViT from a file, which must fill every tensor of the encoder."""

from __future__ import annotations

import os
import sys
from typing import Any

from torch import Tensor, nn

from softmask.models.layers.weight_files import read_tensors


def load_vit(vit: nn.Module, file: str) -> str:
    """Fill `vit` from a file with timm's names; patch projection and position embeddings are resized as timm does.

    Returns how many tensors were filled and how many of the file are unused, in words.

    Raises:
        ValueError: no such file, no weights, or a tensor of the encoder that the file does not fill.
    """
    state = _read(file)
    fit = getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", None)
    try:
        fitted: dict[str, Any] = fit(dict(state), vit) if fit else state
    except (KeyError, RuntimeError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"vision.checkpoint: {file} does not fit: {' '.join(str(error).split())}") from error
    own = vit.state_dict()
    missing = [name for name in own if name not in fitted]
    if missing:
        foreign = next((name for name in state if name not in own), "nothing else")
        raise ValueError(
            f"vision.checkpoint: {file} fills {len(own) - len(missing)} of {len(own)} tensors of the encoder; it lacks "
            f"{missing[0]!r} and holds {foreign!r}: expected timm's names for this vision.name"
        )
    for name, tensor in own.items():
        if fitted[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)}, got {tuple(fitted[name].shape)}"
            raise ValueError(f"vision.checkpoint: {file}: expected {name} of shape {shapes}")
    vit.load_state_dict({name: fitted[name] for name in own})
    left = [name for name in fitted if name not in own]
    return f"{len(own)} tensors of {file}" + (f", {len(left)} of the file unused ({left[0]} ...)" if left else "")


def _read(file: str) -> dict[str, Tensor]:
    if not os.path.isfile(file):
        what = "got a folder" if os.path.isdir(file) else "no such file"
        raise ValueError(f"vision.checkpoint: expected a file of weights, {file}: {what}")
    return read_tensors(file, "vision.checkpoint")
