"""Reading of metrics.json, with a check of every number that the report shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, get_args

from softmask.evaluation.retrieval import RerankBy
from softmask.training.checkpoint.state import CheckpointError, read_json

BOTH_WAYS = {way: {"r1": float, "r5": float, "r10": float} for way in ("i2t", "t2i")}
SCORES = {"cider": float, "bleu4": float, "rouge_l": float}
RETRIEVAL: dict[str, Any] = {"samples": int, "images": int, "itc": BOTH_WAYS, "chance": BOTH_WAYS}
ALWAYS: dict[str, Any] = {"training": {"seconds": float, "steps": int}, "evaluation": {}}
OPTIONAL: dict[str, Any] = {
    "grounding": {name: float for name in ("pointing", "random", "attention")} | {"words": int, "samples": int},
    "captioning": SCORES | {"samples": int, "beams": int},
    "reconstruction": {name: float for name in ("right", "wrong", "gap", "low", "high")} | {"samples": int},
    "zero_shot": {name: float for name in ("top1", "top5", "chance")} | {"samples": int, "classes": int},
}


@dataclass(frozen=True)
class Maybe:
    """A value that may be missing."""

    spec: Any


@dataclass(frozen=True)
class Each:
    """An object whose values, under any names, are alike."""

    spec: Any


@dataclass(frozen=True)
class Counts:
    """A square matrix of counts."""

    size: int


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether the value is a finite number of a size that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def read_metrics(path: Path, needed: dict[str, Any]) -> dict[str, Any]:
    """metrics.json of a run, with the sections `needed`.

    Raises:
        CheckpointError: unreadable, or not what train/evaluate.py writes; names the key.
    """
    needed = needed | ALWAYS
    result = read_json(path, *needed)
    for name, spec in (OPTIONAL | needed).items():
        if name in needed or name in result:
            _check(path, name, result[name], spec)
    if "retrieval" in needed:
        _check_retrieval(path, result["retrieval"])
    _check_captioning(path, result.get("captioning", {}))
    return result


def _check_captioning(path: Path, captioning: dict[str, Any]) -> None:
    for name in ("beams_alone", "nearest", "random"):
        if name in captioning:
            _check(path, f"captioning.{name}", captioning[name], SCORES)
    if "min_length" in captioning:
        _check(path, "captioning.min_length", captioning["min_length"], int)
    if not isinstance(captioning.get("prompt", ""), str):
        raise _wrong(path, "captioning.prompt", "a text", captioning["prompt"])


def _check_retrieval(path: Path, retrieval: dict[str, Any]) -> None:
    if "itm" in retrieval:
        _check(path, "retrieval", retrieval, {"itm": BOTH_WAYS, "rerank": int})
        if retrieval.get("rerank_by") not in get_args(RerankBy):
            known = ", ".join(get_args(RerankBy))
            raise _wrong(path, "retrieval.rerank_by", f"one of {known}", retrieval.get("rerank_by"))
    if "unseen" in retrieval:
        stages = {stage: BOTH_WAYS for stage in ("itc", "itm", "chance") if stage in retrieval}
        _check(path, "retrieval.unseen", retrieval["unseen"], stages | {"samples": int, "images": int})


def _check(path: Path, name: str, value: Any, spec: Any) -> None:
    if isinstance(spec, Maybe):
        if value is None:
            return
        spec = spec.spec
    if isinstance(spec, dict | Each):
        if not isinstance(value, dict):
            raise _wrong(path, name, "an object", value)
        for key, inner in spec.items() if isinstance(spec, dict) else dict.fromkeys(value, spec.spec).items():
            _check(path, f"{name}.{key}", value.get(key), inner)
    elif isinstance(spec, Counts) and not _is_matrix(value, spec.size):
        raise _wrong(path, name, f"{spec.size} rows of {spec.size} counts", value)
    elif spec is int and not _is_count(value):
        raise _wrong(path, name, "a non-negative integer", value)
    elif spec is float and not is_number(value):
        raise _wrong(path, name, "a number", value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _is_matrix(value: Any, size: int) -> bool:
    rows = value if isinstance(value, list) and len(value) == size else [None]
    return all(isinstance(row, list) and len(row) == size and all(map(_is_count, row)) for row in rows)


def _wrong(path: Path, name: str, expected: str, value: Any) -> CheckpointError:
    return CheckpointError(f"{path}: {name}: expected {expected}, got {value!r:.80}; run train/evaluate.py again")
