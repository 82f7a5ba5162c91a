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
from softmask.evaluation.readers import Reader, Sample, Scorer, consecutive, pixels, share_samples

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


def zero_shot(scorer: Scorer, reader: Reader, classes: Sequence[Class]) -> dict | None:
    """The metrics.json section; None if no image shows a single object of a class."""
    number = {one.name: index for index, one in enumerate(classes)}
    prompts, cut = class_features(scorer, classes)

    def ranked(samples: list[Sample]) -> tuple[int, list[int]]:
        """Images of a single object, and how many of them have their class among the first k, for each k of TOP."""
        shown = [(sample, own) for sample in samples if (own := only_class(sample, number)) is not None]
        if not shown:
            return 0, [0] * len(TOP)
        right = torch.tensor([own for _, own in shown])
        order = similarities(scorer, [sample for sample, _ in shown], prompts).argsort(dim=1, descending=True)
        return len(shown), [int((order[:, :k] == right[:, None]).any(1).sum()) for k in TOP]

    pieces = consecutive(reader, scorer.batch_size)
    found = share_samples(reader, pieces, ranked, show="zero-shot classes", with_objects=True)
    total = sum(count for count, _ in found)
    if not total:
        return None
    hits = [sum(own) for own in zip(*(hit for _, hit in found), strict=True)]
    shares = {f"top{k}": hit / total for k, hit in zip(TOP, hits, strict=True)}
    result = {"samples": total, "classes": len(classes), **shares, "chance": 1.0 / len(classes)}
    return result | ({"cut_prompts": cut} if cut else {})


def only_class(sample: Sample, number: dict[str, int]) -> int | None:
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


@torch.no_grad()
def similarities(scorer: Scorer, samples: Sequence[Sample], prompts: Tensor) -> Tensor:
    """Similarities of images and classes [B, C], on the CPU."""
    _, feature = scorer.model.encode_image(pixels(scorer, samples))
    return (feature @ prompts.T).float().cpu()
