"""What a configuration of a task after pre-training takes from the run that it starts from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from softmask.training.config_files import ConfigError, read_mapping

READING = ("max_length", "clean_captions", "append_sep", "eval_resize", "mean", "std")
"""Keys of `data:` that the pre-trained model was trained with."""


def inherit(tree: dict[str, Any]) -> None:
    """Fill the keys that `tree` lacks from `init`'s config.yaml: method, model, and how texts and pictures are read.

    `data.image_size` and `model.vision.image_size` follow each other where one of them is given.

    Raises:
        ConfigError: there is no such run, and `tree` has no model of its own.
    """
    data, model = (_section(tree, name) for name in ("data", "model"))
    vision = _section(model, "vision")
    sizes = [size for size in (data.get("image_size"), vision.get("image_size")) if size is not None]
    if init := tree.get("init"):
        given = _config_of(str(init), needed=not model.keys() - {"vision"})
        if "method" in given and tree.setdefault("method", given["method"]) == given["method"]:
            _fill(model, given.get("model", {}))
        _fill(data, {key: value for key, value in given.get("data", {}).items() if key in READING})
        sizes = sizes or [given.get("data", {}).get("image_size")]
    if sizes and sizes[0] is not None:
        data.setdefault("image_size", sizes[0])
        vision["image_size"] = sizes[0] if len(sizes) == 1 else sizes[1]


def _config_of(init: str, *, needed: bool) -> dict[str, Any]:
    path = Path(os.path.expanduser(init)) / "config.yaml"
    if path.is_file():
        return read_mapping(path, "init")
    if needed:
        raise ConfigError(f"init: expected the folder of a run or checkpoint, with its config.yaml, got {init!r}")
    return {}


def _section(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """The mapping under a name, which is made if it is missing. A value that is none is left for later checks."""
    if tree.get(name) is None:
        tree[name] = {}
    return tree[name] if isinstance(tree[name], dict) else {}


def _fill(tree: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Put those keys that the tree lacks, in all depths."""
    for key, value in defaults.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _fill(tree[key], value)
        else:
            tree.setdefault(key, value)
