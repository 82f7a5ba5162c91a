"""Tensors from a file of weights, safetensors or torch's, read without executing code."""

from __future__ import annotations

import os

from timm.models import load_state_dict
from torch import Tensor

from softmask.lfs import refuse_pointer


def read_tensors(file: str | os.PathLike, key: str) -> dict[str, Tensor]:
    """Name -> tensor. Raises ValueError, with the configuration's `key`, if the file holds no tensors."""
    try:
        refuse_pointer(file, key)
        state = load_state_dict(os.fspath(file))
    except OSError as error:
        raise ValueError(f"{key}: {file} cannot be read: {error.strerror}") from error
    except ValueError:
        raise
    except Exception as error:  # unpickling foreign bytes may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise ValueError(f"{key}: {file} holds no weights ({reason})") from error
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{key}: {file} holds no weights")
    return tensors
