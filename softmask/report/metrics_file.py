"""Reading of metrics.json, with a check of every number that the report shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeGuard, get_args

from softmask.evaluation.retrieval import RerankBy
from softmask.training.checkpoint.state import CheckpointError, read_json

BOTH_WAYS = {way: {"r1": float, "r5": float, "r10": float} for way in ("i2t", "t2i")}
SCORES = {"cider": float, "bleu4": float, "rouge_l": float}
NEEDED: dict[str, Any] = {
    "retrieval": {"samples": int, "images": int, "itc": BOTH_WAYS, "chance": BOTH_WAYS},
    "training": {"seconds": float, "steps": int},
    "evaluation": {},
}
OPTIONAL: dict[str, Any] = {
    "grounding": {name: float for name in ("pointing", "random", "attention")} | {"words": int, "samples": int},
    "captioning": SCORES | {"samples": int, "beams": int},
    "reconstruction": {name: float for name in ("right", "wrong", "gap", "low", "high")} | {"samples": int},
    "zero_shot": {name: float for name in ("top1", "top5", "chance")} | {"samples": int, "classes": int},
}


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether the value is a finite number of a size that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def read_metrics(path: Path) -> dict[str, Any]:
    """metrics.json of a run.

    Raises:
        CheckpointError: unreadable, or not what train/evaluate.py writes; names the key.
    """
    result = read_json(path, *NEEDED)
    for name, spec in (NEEDED | OPTIONAL).items():
        if name in NEEDED or name in result:
            _check(path, name, result[name], spec)
    if "itm" in (retrieval := result["retrieval"]):
        _check(path, "retrieval", retrieval, {"itm": BOTH_WAYS, "rerank": int})
        if retrieval.get("rerank_by") not in get_args(RerankBy):
            known = ", ".join(get_args(RerankBy))
            raise _wrong(path, "retrieval.rerank_by", f"one of {known}", retrieval.get("rerank_by"))
    if "unseen" in retrieval:
        stages = {stage: BOTH_WAYS for stage in ("itc", "itm", "chance") if stage in retrieval}
        _check(path, "retrieval.unseen", retrieval["unseen"], stages | {"samples": int, "images": int})
    captioning = result.get("captioning", {})
    for name in ("beams_alone", "nearest", "random"):
        if name in captioning:
            _check(path, f"captioning.{name}", captioning[name], SCORES)
    if "min_length" in captioning:
        _check(path, "captioning.min_length", captioning["min_length"], int)
    if not isinstance(captioning.get("prompt", ""), str):
        raise _wrong(path, "captioning.prompt", "a text", captioning["prompt"])
    return result


def _check(path: Path, name: str, value: Any, spec: Any) -> None:
    if isinstance(spec, dict):
        if not isinstance(value, dict):
            raise _wrong(path, name, "an object", value)
        for key, inner in spec.items():
            _check(path, f"{name}.{key}", value.get(key), inner)
    elif spec is int and not (type(value) is int and 0 <= value < 1 << 31):
        raise _wrong(path, name, "a non-negative integer", value)
    elif spec is float and not is_number(value):
        raise _wrong(path, name, "a number", value)


def _wrong(path: Path, name: str, expected: str, value: Any) -> CheckpointError:
    return CheckpointError(f"{path}: {name}: expected {expected}, got {value!r:.80}; run train/evaluate.py again")
