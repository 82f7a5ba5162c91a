"""What the report shows of a task: a class that the task names."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from softmask.evaluation.readers import Reader, Scorer
from softmask.tasks.base import Task
from softmask.training.config import ConfigError


@dataclass
class Given:
    """A run with its evaluation, the input of a view.

    Attributes:
        scorer: the model with its tokenizer and configuration.
        reader: the data of the evaluation.
        result: metrics.json.
        blank: the same of grey pictures; None: not measured.
        count: how many examples are shown.
    """

    scorer: Scorer
    reader: Reader
    result: dict[str, Any]
    blank: dict[str, Any] | None
    count: int


@dataclass
class Shown:
    """Markup of the headline numbers, and of the sections after the curves."""

    tiles: list[str]
    sections: list[str]


class View:
    """A task's part of the report. For one of your own, write a subclass and name it `module:Class` in your task.

    Attributes:
        shows_blank: whether it shows the figures of grey pictures, blank.json.
    """

    shows_blank: bool = False

    def __init__(self, task: Task) -> None:
        self.task = task

    @property
    def needed(self) -> dict[str, Any]:
        """The sections of metrics.json that the view shows, as metrics_file.py checks them."""
        raise NotImplementedError

    def show(self, given: Given) -> Shown:
        raise NotImplementedError


def find_view(task: Task, name: str) -> View:
    """The view of the task that a configuration names so.

    Raises:
        ConfigError: the task has none, or names something else.
    """
    if not task.view:
        raise ConfigError(f"a run of {name} has no report; its figures are in metrics.json and log.jsonl")
    module, _, attribute = task.view.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{name}: the view {task.view!r} cannot be imported ({error})") from error
    if not (isinstance(found, type) and issubclass(found, View)):
        raise ConfigError(f"{name}: expected a subclass of {__name__}.View as module:Class, got {task.view!r}")
    return found(task)


def spread(total: int, wanted: int) -> list[int]:
    """`wanted` evenly spaced numbers of range(total), or all of them."""
    if total <= wanted:
        return list(range(total))
    return [round((part + 0.5) * total / wanted - 0.5) for part in range(wanted)]
