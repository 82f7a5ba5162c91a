"""Checkpoints of any ZeRO stage and number of ranks, read by parameter name and loaded into any other engine.

DeepSpeed 0.19's universal checkpoints cannot do this: their converter finds no file at stage 0, fails on 0-dim
parameters at stages 1 and 2, and from stage 3 makes checkpoints that load at stage 3 only, without momentum encoder,
queue and running statistics, and with the first parameter group's weight decay for all.

DeepSpeed's files: up to stage 2 one file holds all weights and buffers, and at stage 0 the moments; at stages 1 and 2
every rank has a piece of each group's flattened moments; at stage 3 every rank has a piece of each parameter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softmask.lfs import refuse_pointer
from softmask.tasks.base import Task
from softmask.tasks.registry import find_task
from softmask.training.config import OptimizerConfig
from softmask.training.config_files import read_mapping
from softmask.training.engine.startup import choose_accelerator
from softmask.training.engine.zero import own_range
from softmask.training.optim import parameter_groups

MODEL_FILE = "mp_rank_00_model_states.pt"  # of all ranks, up to stage 2
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Pieces:
    """A tensor in flat pieces, in the order of the ranks; anything beyond its size is padding."""

    shape: torch.Size
    parts: list[Tensor]

    def whole(self) -> Tensor:
        if self.parts[0].shape == self.shape:
            return self.parts[0]
        return torch.cat(self.parts)[: self.shape.numel()].view(self.shape)


@dataclass
class Place:
    """Elements [start, start + size) of the flattened parameter `name` and where they begin in a flat tensor."""

    name: str
    start: int
    size: int
    offset: int


class SavedState:
    """The files of a checkpoint, mapped into memory: a tensor is read when it is used.

    Raises:
        OSError: missing files.
    """

    def __init__(self, checkpoint: Path) -> None:
        choose_accelerator()  # the files of stages 1 to 3 name classes of DeepSpeed
        self._task = _task_of(checkpoint)
        whole = checkpoint / MODEL_FILE
        self.partitioned = not whole.is_file()
        self.models = _of_ranks(checkpoint, "model_states") if self.partitioned else [_open(whole)]
        self.model = self.models[0]
        split = self.model["optimizer"] is None
        self.ranks = [state["optimizer_state_dict"] for state in _of_ranks(checkpoint, "optim_states")] if split else []

    def weights(self) -> dict[str, Pieces]:
        """All parameters and buffers under today's names, rank 0's where every rank has its own."""
        return self._current(self._weights())

    @property
    def has_earlier_names(self) -> bool:
        return any(name != self._task.current_name(name) for name in self._weights())

    def _weights(self) -> dict[str, Pieces]:
        module = {name: Pieces(tensor.shape, [tensor]) for name, tensor in self.model["module"].items()}
        if not self.partitioned:
            return module
        weights = {name: module[name] for name in self.model["buffer_names"]}
        for name, shape in self.model["frozen_param_shapes"].items():
            weights[name] = Pieces(shape, [model["frozen_param_fragments"][name] for model in self.models])
        return weights | self._shares([rank["fp32_flat_groups"] for rank in self.ranks])

    def _current(self, pieces: dict[str, Pieces]) -> dict[str, Pieces]:
        return {self._task.current_name(name): part for name, part in pieces.items()}

    def moments(self, key: str, order: list[str]) -> dict[str, Pieces]:
        """AdamW's `exp_avg` or `exp_avg_sq` of every trained parameter; `order` is the order in stage 0's optimizer."""
        if not self.ranks:
            states = self.model["optimizer"]["state"]
            return {order[number]: Pieces(state[key].shape, [state[key]]) for number, state in states.items()}
        flat = [[states[number][key] for number in sorted(states)] for states in self._optimizer_states()]
        return self._current(self._shares(flat) if self.partitioned else self._slices(flat))

    def step(self) -> float:
        """Completed optimizer steps, the same for all parameters: a missing gradient counts as zeros."""
        states = self._optimizer_states()[0] if self.ranks else self.model["optimizer"]["state"]
        return float(next(iter(states.values()))["step"])

    def _optimizer_states(self) -> list[dict[int, dict[str, Tensor]]]:
        key = "optimizer_state_dict" if self.partitioned else "base_optimizer_state"
        return [rank[key]["state"] for rank in self.ranks]

    def _shares(self, flat: list[list[Tensor]]) -> dict[str, Pieces]:
        """Stage 3: every rank has an equal share of each parameter."""
        pieces = {}
        for group, shapes in enumerate(self.model["param_shapes"]):
            offset = 0
            for name, shape in shapes.items():
                size = -(-shape.numel() // len(flat))
                pieces[name] = Pieces(shape, [rank[group][offset : offset + size] for rank in flat])
                offset += size
        return pieces

    def _slices(self, flat: list[list[Tensor]]) -> dict[str, Pieces]:
        """Stages 1 and 2: every rank has an equal slice of each group; its bounds cut through parameters."""
        pieces: dict[str, Pieces] = {}
        for rank, groups in zip(self.ranks, flat, strict=True):
            for group, places in enumerate(rank["param_slice_mappings"]):
                for name, place in places.items():
                    own = pieces.setdefault(name, Pieces(self.model["module"][name].shape, []))
                    own.parts.append(groups[group][place.start : place.start + place.numel])
        return pieces


def _task_of(checkpoint: Path) -> Task:
    """The method that made a checkpoint, which knows its parameters' earlier names."""
    return find_task(read_mapping(checkpoint / "config.yaml", "configuration").get("method", "softmask_pp"))


def _of_ranks(checkpoint: Path, kind: str) -> list[dict[str, Any]]:
    """The files of all ranks, in order."""
    files = [checkpoint / f"zero_pp_rank_{rank}_mp_rank_00_{kind}.pt" for rank in range(_world_size(checkpoint))]
    return [_open(file) for file in files]


def _world_size(checkpoint: Path) -> int:
    return json.loads((checkpoint / "trainer.json").read_text(encoding="utf-8"))["world_size"]


def _open(file: Path) -> dict[str, Any]:
    refuse_pointer(file, "weights")
    return torch.load(file, map_location="cpu", weights_only=False, mmap=True)


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The model's state in a checkpoint of any stage, under today's names.

    Raises:
        OSError: missing files.
    """
    if (checkpoint / MODEL_FILE).is_file():
        module, task = _open(checkpoint / MODEL_FILE)["module"], _task_of(checkpoint)
        return {task.current_name(name): tensor for name, tensor in module.items()}
    return {name: pieces.whole() for name, pieces in SavedState(checkpoint).weights().items()}


@torch.no_grad()
def load_resharded(engine: Any, checkpoint: Path, options: OptimizerConfig) -> None:
    """Load weights, buffers, moments, schedule and counters of a checkpoint into an engine of any stage and number of
    ranks. The engine keeps its optimizer's hyperparameters.

    Raises:
        OSError, KeyError, RuntimeError: missing files, or parameters that do not fit.
    """
    saved = SavedState(checkpoint)
    stage = engine.zero_optimization_stage()
    put = _put_partitioned if stage == 3 else _put_whole
    put(engine, saved.weights())
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    groups = parameter_groups(engine.module, options)
    order = [names[parameter] for group in groups for parameter in group["params"]]
    moments = {key: saved.moments(key, order) for key in MOMENTS}
    optimizer = engine.optimizer.optimizer if stage else engine.optimizer
    for flat, places in _flat_tensors(engine, stage, names):
        state = {key: _gathered(flat, places, pieces) for key, pieces in moments.items()}
        optimizer.state[flat] = {"step": torch.tensor(saved.step(), device=flat.device), **state}
    engine.lr_scheduler.load_state_dict(saved.model["lr_scheduler"])
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, saved.model[counter])


def _put_whole(engine: Any, weights: dict[str, Pieces]) -> None:
    engine.module.load_state_dict({name: pieces.whole() for name, pieces in weights.items()})
    if engine.zero_optimization():
        engine.optimizer.refresh_fp32_params()


def _put_partitioned(engine: Any, weights: dict[str, Pieces]) -> None:
    """At stage 3 a rank takes its share of every parameter, and all of every buffer."""
    parameters = dict(engine.module.named_parameters())
    expected = set(engine.module.state_dict())
    if weights.keys() != expected:
        raise KeyError(f"expected the model's tensors, got others: {sorted(weights.keys() ^ expected)[:3]}")
    buffers = {name: pieces.whole() for name, pieces in weights.items() if name not in parameters}
    engine.module.load_state_dict(buffers, strict=False)
    engine.optimizer.checkpoint_event_prologue()  # leaves no copy of a whole parameter
    for name, parameter in parameters.items():
        if parameter.ds_shape != weights[name].shape:
            raise RuntimeError(f"{name}: expected shape {parameter.ds_shape}, got {weights[name].shape}")
        start, size = own_range(parameter)
        parameter.ds_tensor[:size].copy_(weights[name].whole().flatten()[start : start + size])
    engine.optimizer.refresh_fp32_params()
    engine.optimizer.checkpoint_event_epilogue()


def _flat_tensors(engine: Any, stage: int, names: dict[Tensor, str]) -> Iterator[tuple[Tensor, list[Place]]]:
    """The tensors that this rank's AdamW steps, and the parameters' elements in them."""
    zero = engine.optimizer
    if stage == 0:
        for group in zero.param_groups:
            for parameter in group["params"]:
                yield parameter, [Place(names[parameter], 0, parameter.numel(), 0)]
    elif stage == 3:
        for flat, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            yield flat, list(_share_places(parameters, names))
    else:
        for flat, parameters in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True):
            owned = [(names[parameter], parameter._hp_mapping) for parameter in parameters]
            yield flat, [_place(name, mapping) for name, mapping in owned if mapping is not None]


def _share_places(parameters: list[Any], names: dict[Tensor, str]) -> Iterator[Place]:
    offset = 0
    for parameter in parameters:
        yield Place(names[parameter], *own_range(parameter), offset)
        offset += parameter.ds_tensor.numel()


def _place(name: str, mapping: Any) -> Place:
    """From DeepSpeed's record of the parameter's (`lp`) and the flat tensor's (`hp`) addresses."""
    parameter, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Place(name, parameter.start, parameter.numel, flat.start)


def _gathered(flat: Tensor, places: list[Place], pieces: dict[str, Pieces]) -> Tensor:
    """A tensor like `flat` with the elements at `places`, zeros between them."""
    values = torch.zeros_like(flat)
    for place in places:
        own = pieces[place.name].whole().flatten()[place.start : place.start + place.size]
        values.view(-1)[place.offset : place.offset + place.size].copy_(own)
    return values
