"""Finds methods and downstream tasks by the names that a configuration gives.

A module of `softmask.tasks` holds one, whose name is the module's. Other packages register theirs as entry points of
the group `softmask.tasks`, or a configuration names them as `module:Class`.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache
from importlib.metadata import entry_points
from types import ModuleType

from softmask import tasks
from softmask.tasks.base import Task
from softmask.tasks.downstream import DownstreamTask

GROUP = "softmask.tasks"
NO_TASKS = ("base", "downstream", "registry")


def known(kind: type[Task] = Task) -> dict[str, str]:
    """Names of the installed methods, or with `kind` DownstreamTask of the tasks after pre-training -> module or
    module:Class."""
    own = {found.name: f"softmask.tasks.{found.name}" for found in pkgutil.iter_modules(tasks.__path__)}
    downstream = issubclass(kind, DownstreamTask)
    own = {
        name: module
        for name, module in own.items()
        if name not in NO_TASKS and issubclass(_task_in(importlib.import_module(module)), DownstreamTask) == downstream
    }
    return {point.name: point.value for point in entry_points(group=GROUP)} | own


@lru_cache
def find_task(name: str) -> Task:
    """The method with a name, or `module:Class`.

    Raises:
        ValueError: unknown name, a module that cannot be imported, or no subclass of Task.
    """
    found = _find_class(name, key="method", kind=Task)
    if issubclass(found, DownstreamTask):
        raise ValueError(f"method: expected {', '.join(known())}, got {name!r}, which task: names")
    return found()


@lru_cache
def find_downstream(name: str) -> type[DownstreamTask]:
    """The class of the downstream task with a name, or `module:Class`.

    Raises:
        ValueError: as `find_task`.
    """
    found = _find_class(name, key="task", kind=DownstreamTask)
    assert issubclass(found, DownstreamTask)
    return found


def _find_class(name: str, *, key: str, kind: type[Task]) -> type[Task]:
    names = known(kind)
    place = names.get(name, name)
    module, colon, attribute = place.partition(":")
    if not colon and name not in names:
        raise ValueError(f"{key}: expected {', '.join(names)} or module:Class of a task of your own, got {name!r}")
    try:
        imported = importlib.import_module(module)
        found = getattr(imported, attribute) if colon else _task_in(imported)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{key}: {place} cannot be imported ({error})") from error
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ValueError(f"{key}: expected a subclass of {kind.__module__}.{kind.__name__}, got {place}")
    return found


def _task_in(module: ModuleType) -> type[Task]:
    """The task that a module of `softmask.tasks` defines."""
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Task) and value.__module__ == module.__name__
    )
    return found
