"""Finds tasks by the name that a configuration gives.

A module of `softmask.tasks` holds one task, whose name is the module's. Other packages register theirs as entry points
of the group `softmask.tasks`, or a configuration names them as `module:Class`.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache
from importlib.metadata import entry_points
from types import ModuleType

from softmask import tasks
from softmask.tasks.base import Task

GROUP = "softmask.tasks"
NO_TASKS = ("base", "registry")


def known() -> dict[str, str]:
    """Names of the installed tasks -> module or module:Class."""
    own = {found.name: f"softmask.tasks.{found.name}" for found in pkgutil.iter_modules(tasks.__path__)}
    others = {point.name: point.value for point in entry_points(group=GROUP)}
    return others | {name: module for name, module in own.items() if name not in NO_TASKS}


@lru_cache
def find_task(name: str) -> Task:
    """The task with a name, or `module:Class`.

    Raises:
        ValueError: unknown name, a module that cannot be imported, or no subclass of Task.
    """
    names = known()
    place = names.get(name, name)
    module, colon, attribute = place.partition(":")
    if not colon and name not in names:
        raise ValueError(f"method: expected {', '.join(names)} or module:Class of a task of your own, got {name!r}")
    try:
        imported = importlib.import_module(module)
        found = getattr(imported, attribute) if colon else _task_in(imported)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"method: {place} cannot be imported ({error})") from error
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ValueError(f"method: expected a subclass of softmask.tasks.base.Task, got {place}")
    return found()


def _task_in(module: ModuleType) -> type[Task]:
    """The task that a module of `softmask.tasks` defines."""
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Task) and value.__module__ == module.__name__
    )
    return found
