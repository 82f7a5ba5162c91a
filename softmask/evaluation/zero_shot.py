"""Zero-shot classification: the class whose name in CLIP-style templates is most similar to the image.

Only images of a single object are used: the sample's .json has one entry in "objects", its "concept" is a class, its
"phrase" is the class's name (not the plural), and its "count", if present, is 1. Classes come from a JSON list of
{"name", "phrase"}, such as {"name": "red apple", "phrase": "a red apple"}; for the demo's scenes this is
`concepts.json`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from softmask.data import DataError
from softmask.evaluation.gallery import encode_captions
from softmask.evaluation.one_pass import Encoded, Measure
from softmask.evaluation.readers import Entry, Scorer

TEMPLATES = ("{}", "there is {}", "a picture of {}", "a drawing of {}")
TOP = (1, 5)


@dataclass(frozen=True)
class Class:
    name: str
    phrase: str


def read_classes(path: Path) -> list[Class]:
    """The classes of a JSON file.

    Raises:
        DataError: not a list of classes, an empty list, or a name that occurs twice.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        classes = [Class(entry["name"], entry["phrase"]) for entry in entries]
        if not all(isinstance(text, str) for one in classes for text in (one.name, one.phrase)):
            raise TypeError("a name or phrase is not a string")
        for one in classes:
            one.phrase.encode()  # lone surrogates, which JSON escapes can smuggle in
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: expected a JSON list of classes with name and phrase: {reason}") from error
    if len({one.name for one in classes}) != len(classes) or not classes:
        raise DataError(f"{path}: expected at least one class and unique names, got {len(classes)} classes")
    return classes


class ZeroShot(Measure[list[int]]):
    """The metrics.json section; None if no image shows a single object of a class."""

    def __init__(self, scorer: Scorer, classes: Sequence[Class]) -> None:
        self._numbers = {one.name: index for index, one in enumerate(classes)}
        self._prompts, self._cut = class_features(scorer, classes)

    def wants(self, entry: Entry) -> bool:
        return only_class(entry, self._numbers) is not None

    def look(self, seen: Encoded) -> list[int]:
        """How many samples there are, and how many of them have their class among the first k, for each k of TOP."""
        right = torch.tensor([only_class(sample, self._numbers) for sample in seen.samples])
        order = (seen.features @ self._prompts.T).float().cpu()[seen.picture].argsort(dim=1, descending=True)
        return [len(right), *(int((order[:, :k] == right[:, None]).any(1).sum()) for k in TOP)]

    def result(self, found: Sequence[list[int]]) -> dict | None:
        if not found:
            return None
        total, *hits = (sum(own) for own in zip(*found, strict=True))
        shares = {f"top{k}": hit / total for k, hit in zip(TOP, hits, strict=True)}
        count = len(self._numbers)
        result = {"samples": total, "classes": count, **shares, "chance": 1.0 / count}
        return result | ({"cut_prompts": self._cut} if self._cut else {})


def only_class(sample: Entry, number: dict[str, int]) -> int | None:
    """The class of the image's single object; None if it has no, several or other objects."""
    if not sample.objects or len(sample.objects) > 1:
        return None
    (entry,) = sample.objects
    if not isinstance(entry, dict):
        sample.bad_objects[f"{sample.name}: objects[0]"] = f"expected phrase, span, mask and concept, got {entry!r}"
        return None
    name, one = entry.get("concept"), entry.get("count", 1) == 1
    return number.get(name) if isinstance(name, str) and entry.get("phrase") == name and one else None


def class_features(scorer: Scorer, classes: Sequence[Class]) -> tuple[Tensor, int]:
    """The normalized mean feature of each class's prompts, [C, d], and how many prompts were truncated."""
    prompts = [template.format(one.phrase) for one in classes for template in TEMPLATES]
    _, features, read = encode_captions(scorer, prompts)
    mean = features.unflatten(0, (len(classes), len(TEMPLATES))).mean(1)
    return F.normalize(mean, dim=-1), int(read.cut.sum())


def cut_prompt_lines(result: dict, *, length: int) -> list[str]:
    """A line for the terminal if prompts of class names were truncated to `length` tokens."""
    cut = result.get("cut_prompts")
    return [f"  {cut} prompts of class names were truncated to {length} tokens"] if cut else []
