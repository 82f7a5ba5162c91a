"""Typed configuration of a training run, read from YAML (or JSON) with `key=value` overrides.

Unknown keys, values of the wrong type and values out of range are a `ConfigError` that names the dotted key, what was
expected and what came.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import softmask
from softmask.data import DataConfig
from softmask.tasks.base import Task
from softmask.tasks.registry import find_downstream, find_task
from softmask.training.config_files import ConfigError, describe, dump, override, read_mapping
from softmask.training.deepspeed_section import check_deepspeed
from softmask.training.inheritance import inherit

ZERO_STAGES = (0, 1, 2, 3)
PRETRAIN = "pretrain"


@dataclass
class OptimizerConfig:
    """AdamW with a linear warm-up from 0 to `lr`, then a cosine decay to `min_lr` at the last step."""

    lr: float = 1e-4
    min_lr: float = 1e-5
    # Prefix of parameter names -> factor on both rates, such as {backbone.vision: 0.1}; the longest match counts.
    lr_scales: dict[str, float] = field(default_factory=dict)
    vision_layer_decay: float = 1.0  # rates of the image encoder's layers, each this times the next one's
    warmup_steps: int = 2000
    weight_decay: float = 0.02  # of matrices and kernels, except position embeddings and class tokens
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _require(self.lr > 0, "lr", "a number > 0", self.lr)
        _require(0 <= self.min_lr <= self.lr, "min_lr", f"a number in [0, lr = {self.lr:g}]", self.min_lr)
        for part, scale in self.lr_scales.items():
            _require(scale > 0, f"lr_scales.{part}", "a number > 0", scale)
        _require(0 < self.vision_layer_decay <= 1, "vision_layer_decay", "a number in (0, 1]", self.vision_layer_decay)
        _require(self.warmup_steps >= 0, "warmup_steps", "an integer >= 0", self.warmup_steps)
        _require(self.weight_decay >= 0, "weight_decay", "a number >= 0", self.weight_decay)
        _require(all(0 <= beta < 1 for beta in self.betas), "betas", "two numbers in [0, 1)", list(self.betas))
        _require(self.eps > 0, "eps", "a number > 0", self.eps)


@dataclass
class ProfileConfig:
    """A window of optimizer steps that rank 0 records with torch.profiler into `output`/profile/."""

    start: int = 10  # optimizer steps before the window, from the start of this process on
    steps: int = 0  # optimizer steps in the window; 0: no profile

    def __post_init__(self) -> None:
        _require(self.start >= 0, "start", "an integer >= 0", self.start)
        _require(self.steps >= 0, "steps", "an integer >= 0 (0: no profile)", self.steps)


@dataclass
class TrainConfig:
    """Length, batches, precision and bookkeeping of a run."""

    steps: int = 0  # optimizer steps, or
    epochs: float = 0.0  # passes over the captions
    batch_size: int = 64  # per rank and micro-step
    accumulation: int = 1  # micro-steps per optimizer step
    clip_grad: float = 0.0  # largest global gradient norm; 0: no clipping
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of matrix products; weights stay fp32
    activation_checkpointing: bool = False
    checkpoint_every: int = 1000  # steps; 0: only at the end
    keep_checkpoints: int = 2
    validate_every: int = 0  # steps between measurements on data.val; 0: every epoch
    patience: int = 0  # measurements in a row without a better score after which the run ends; 0: it never ends early
    log_every: int = 20
    max_nonfinite: int = 20  # consecutive micro-batches with nonfinite loss or gradients, after which the run ends
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        _require(self.steps >= 0, "steps", "an integer >= 0", self.steps)
        _require(self.epochs >= 0, "epochs", "a number >= 0", self.epochs)
        if (self.steps > 0) == (self.epochs > 0):
            raise ValueError(f"steps: expected either steps or epochs, got {self.steps} steps, {self.epochs:g} epochs")
        _require(self.batch_size >= 2, "batch_size", "an integer >= 2 (negatives come from the batch)", self.batch_size)
        for name in ("accumulation", "keep_checkpoints", "log_every", "max_nonfinite"):
            _require(getattr(self, name) >= 1, name, "an integer >= 1", getattr(self, name))
        for name in ("checkpoint_every", "validate_every", "patience"):
            _require(getattr(self, name) >= 0, name, "an integer >= 0", getattr(self, name))
        _require(self.clip_grad >= 0, "clip_grad", "a number >= 0", self.clip_grad)


@dataclass
class Config:
    """One run. `output` is its folder; `deepspeed` holds DeepSpeed's own keys (zero_optimization, ...)."""

    output: str
    train: TrainConfig
    seed: int = 0
    method: str = "softmask_pp"  # softmask_pp, sycoca, another method, or module:Class; it defines the keys of `model`
    task: str = "pretrain"  # or a task after pre-training, or module:Class of one; it defines the keys of `head`
    init: str = ""  # run or checkpoint to take weights (and tokenizer, unless data.tokenizer is set) from
    # starts of parameter names, such as itm_head: parts that `init` may lack or have beyond this model
    init_heads: list[str] = field(default_factory=list)
    model: Any = None  # None: the method's defaults
    head: Any = None  # None: the task's defaults
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(bool(self.output), "output", "the folder of the run", self.output)
        _require(bool(self.init) or not self.init_heads, "init_heads", "nothing without init", self.init_heads)
        for key, path in (("output", self.output), ("init", self.init)):
            _require(_is_path(path), key, "a path", path)
        _require(0 <= self.seed < 1 << 63, "seed", "an integer >= 0, below 2^63", self.seed)
        if self.head is None and self.task != PRETRAIN:
            self.head = find_downstream(self.task).Head()
        task = self.find_task()
        self.model = task.Config() if self.model is None else self.model
        scales = self.optimizer.lr_scales
        self.optimizer.lr_scales = {task.current_name(part): scale for part, scale in scales.items()}
        check_deepspeed(self.deepspeed)
        self.output, self.init = os.path.expanduser(self.output), os.path.expanduser(self.init)
        _require(self.zero_stage in ZERO_STAGES, "deepspeed.zero_optimization.stage", "0, 1, 2 or 3", self.zero_stage)
        if self.data.image_size != self.model.vision.image_size:
            raise ValueError(
                f"data.image_size: expected model.vision.image_size = {self.model.vision.image_size}, "
                f"got {self.data.image_size}"
            )

        for key in ("validate_every", "patience"):
            value = getattr(self.train, key)
            _require(not value or bool(self.data.val), f"train.{key}", "0 without data.val", value)
        if self.task == PRETRAIN and self.data.val:
            raise ValueError(f"data.val: expected nothing with task: {PRETRAIN}, got {self.data.val!r}")
        if self.data.eval_resize == "auto":
            self.data.eval_resize = task.eval_resize
        expected = f"true with method: {self.method}, whose captions end with [SEP]"
        _require(self.data.append_sep or not task.ends_captions, "data.append_sep", expected, self.data.append_sep)

    def find_task(self) -> Task:
        """The interface of the method, or of the task after pre-training that is trained with it."""
        method = find_task(self.method)
        return method if self.task == PRETRAIN else find_downstream(self.task)(method, self.method, self.head)

    @property
    def zero_stage(self) -> int:
        section = self.deepspeed.get("zero_optimization", {})
        if not isinstance(section, dict):
            raise ValueError(f"deepspeed.zero_optimization: expected a mapping, got {section!r}")
        return section.get("stage", 0)


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        path: a YAML or JSON file, or the name of an installed configuration (`demo`, `softmask_base`).
        overrides: texts such as `train.steps=100`, with YAML values.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, a value of the wrong type or out of range.
    """
    path = _find(os.path.expanduser(path))
    tree = read_mapping(path, "configuration")
    override(tree, list(overrides))
    if isinstance(tree.get("deepspeed"), str):
        tree["deepspeed"] = read_mapping(_beside(path, tree["deepspeed"]), "deepspeed")
    if tree.get("task", PRETRAIN) != PRETRAIN:
        inherit(tree)
        tree["head"] = tree.get("head") or {}
    tree["model"] = tree.get("model") or {}
    method, task = (tree.get(key, default) for key, default in (("method", "softmask_pp"), ("task", PRETRAIN)))
    try:
        kinds = {"model": find_task(method if isinstance(method, str) else "").Config}
        if task != PRETRAIN:
            kinds["head"] = find_downstream(task if isinstance(task, str) else "").Head
        elif tree.pop("head", None):
            raise ValueError(f"head: expected nothing with task: {PRETRAIN}")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return _build(Config, tree, "", types=kinds)


def save_config(config: Config, path: str | Path) -> None:
    """Write a YAML file that `load_config` reads as an equal configuration."""
    tree = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
    Path(path).write_text(dump(tree), encoding="utf-8")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of every leaf of a (nested) dataclass."""
    leaves: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value, key = getattr(config, item.name), f"{prefix}{item.name}"
        leaves |= flatten(value, f"{key}.") if dataclasses.is_dataclass(value) else {key: value}
    return leaves


def chosen(config: Config) -> dict[str, Any]:
    """Dotted key -> value of all keys that differ from the method's defaults, except output, length and data."""
    shortest = TrainConfig(steps=1)
    plain = Config(config.output, shortest, method=config.method, task=config.task, model=type(config.model)())
    defaults, aside = (
        flatten(plain),
        ("output", "method", "task", "train.steps", "train.epochs", "data.train", "data.image_size"),
    )
    return {key: value for key, value in flatten(config).items() if key not in aside and value != defaults[key]}


def _is_path(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeError:
        return False


def _require(condition: bool, key: str, expected: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"{key}: expected {expected}, got {value!r}")


def _find(name: str) -> Path:
    """The file of that name, or else an installed configuration: in the package, or in the checkout around it."""
    package = Path(softmask.__file__).parent
    folders = [] if os.path.dirname(name) else [package / "configs", package.parent / "train" / "configs"]
    places = [Path(name), *(folder / f"{name}{suffix}" for folder in folders for suffix in ("", ".yaml"))]
    return next((place for place in places if place.is_file()), Path(name))


def _beside(path: Path, name: str) -> Path:
    """`name` as given, or relative to the folder of the file that mentions it."""
    given = Path(os.path.expanduser(name))
    return given if given.is_absolute() or given.exists() else path.parent / given


def _build(cls: type, tree: Any, prefix: str, *, types: dict[str, type] | None = None) -> Any:
    """A dataclass from a mapping.

    `prefix` is the dotted key of the mapping with a trailing dot; `types` overrides the declared types of fields.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{prefix[:-1]}: expected a mapping, got {describe(tree)}")
    hints = typing.get_type_hints(cls) | (types or {})
    names = [item.name for item in dataclasses.fields(cls)]
    for key in tree:
        if key not in names:
            raise ConfigError(_unknown(prefix, str(key), names))
    for item in dataclasses.fields(cls):
        needed = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if needed and item.name not in tree:
            raise ConfigError(f"{prefix}{item.name}: missing, it has no default")
    values = {key: _convert(hints[key], value, f"{prefix}{key}") for key, value in tree.items()}
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:  # a value out of range; the message starts with "field" or "section.field"
        section = prefix[:-1].rpartition(".")[2]
        raise ConfigError(prefix + str(error).removeprefix(f"{section}.")) from error


def _unknown(prefix: str, key: str, names: list[str]) -> str:
    near = difflib.get_close_matches(key, names, n=3)
    hint = f"did you mean {' or '.join(prefix + name for name in near)}?" if near else f"known: {', '.join(names)}"
    return f"{prefix}{key}: unknown key; {hint}"


def _convert(hint: Any, value: Any, key: str) -> Any:
    """`value` as the type `hint`. Raises a ConfigError that names `key` if it cannot be."""
    if hint is Any:
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _build(hint, {} if value is None else value, f"{key}.")
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, key)
    if origin is Literal:
        if value in arguments and type(value) in {type(choice) for choice in arguments}:
            return value
        raise ConfigError(f"{key}: expected {' or '.join(map(str, arguments))}, got {describe(value)}")
    if origin in (tuple, list):
        return _convert_sequence(origin, arguments, value, key)
    if origin is dict:
        if isinstance(value, dict):
            return {name: _convert(arguments[1], entry, f"{key}.{name}") for name, entry in value.items()}
        raise ConfigError(f"{key}: expected a mapping, got {describe(value)}")
    return _convert_scalar(hint, value, key)


def _convert_union(choices: tuple[Any, ...], value: Any, key: str) -> Any:
    if value is None and type(None) in choices:
        return None
    errors = []
    for choice in choices:
        if choice is not type(None):
            try:
                return _convert(choice, value, key)
            except ConfigError as error:
                errors.append(error)
    raise errors[0]


def _convert_sequence(origin: type, arguments: tuple[Any, ...], value: Any, key: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{key}: expected a list, got {describe(value)}")
    if origin is tuple and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise ConfigError(f"{key}: expected a list of {len(arguments)}, got {describe(value)}")
    else:
        arguments = (arguments[0],) * len(value)
    pairs = zip(arguments, value, strict=True)
    return origin(_convert(hint, item, f"{key}[{i}]") for i, (hint, item) in enumerate(pairs))


def _convert_scalar(hint: type, value: Any, key: str) -> Any:
    if hint is float and type(value) in (int, float, str):
        with contextlib.suppress(ValueError, OverflowError):
            if math.isfinite(float(value)):
                return float(value)
        raise ConfigError(f"{key}: expected a finite float, got {describe(value)}")
    if hint is int and type(value) is float and value.is_integer():  # 1e3
        return int(value)
    if type(value) is hint:
        return value
    raise ConfigError(f"{key}: expected {hint.__name__}, got {describe(value)}")
