"""What a study of training runs is: its rows, each trained with several seeds, and the figures of its table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Literal

Measured = Mapping[str, dict]  # name of an evaluation -> contents of its metrics.json
Figure = Callable[[Measured], float | None]  # a fraction; None: not measured
Script = Literal["pretrain", "finetune"]
Evaluations = Mapping[str, tuple[str, ...]]  # name -> options of train/evaluate.py, --data first


class StudyError(RuntimeError):
    """A run failed or is unusable; the message names it."""


@dataclass(frozen=True)
class Row:
    """One configuration of a study."""

    name: str  # folder name, and value of --rows
    title: str
    overrides: tuple[str, ...] = ()  # key=value, of the configuration
    base: str = ""  # name of the row that this one is compared with
    published: tuple[float, ...] = ()  # the paper's values in percent, one per title in the study's `published`
    script: Script | None = "pretrain"  # None: nothing is trained, the run of `init` is evaluated
    config: Path | None = None  # None: the study's
    init: str = ""  # study/row of the runs that this one's start from, seed by seed
    init_heads: tuple[str, ...] = ()  # parts that those runs lack
    evaluations: Evaluations | None = None  # None: the study's


@dataclass(frozen=True)
class Study:
    """The rows of one table.

    Attributes:
        name: folder name.
        note: a paragraph above the table.
        rows: row names are unique over the studies of a plan.
        figures: title -> value, read from a run's metrics.
        published: titles of the paper's figures.
        shown: whether it has a table of its own.
    """

    name: str
    title: str
    note: str
    config: Path
    evaluations: Evaluations
    rows: tuple[Row, ...]
    figures: dict[str, Figure] = field(default_factory=dict)
    published: tuple[str, ...] = ()
    shown: bool = True


def mean_recall(evaluation: str, stage: str = "itc") -> Figure:
    """The mean of R@1, R@5 and R@10, image to caption and caption to image; `stage` is itc, or itm for re-ranked
    results."""
    return lambda measured: fmean(
        share for way in measured[evaluation]["retrieval"][stage].values() for share in way.values()
    )


def first_recall(evaluation: str, stage: str) -> Figure:
    """The mean of R@1 image to caption and caption to image."""
    return lambda measured: fmean(way["r1"] for way in measured[evaluation]["retrieval"][stage].values())


def section_figure(evaluation: str, *keys: str) -> Figure:
    """The value under nested keys of metrics.json, some of which some rows lack."""

    def read(measured: Measured) -> float | None:
        found: dict | float | None = measured[evaluation]
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found if isinstance(found, int | float) else None

    return read
