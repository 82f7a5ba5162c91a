"""Finds tasks by the name that a configuration gives."""

from __future__ import annotations

import importlib
from functools import lru_cache
from importlib.metadata import entry_points

from softmask.tasks.base import Task

BUILT_IN = {
    "softmask_pp": "softmask.tasks.softmask_pp:SoftMaskPPTask",
    "sycoca": "softmask.tasks.sycoca:SyCoCaTask",
}
GROUP = "softmask.tasks"


def known() -> dict[str, str]:
    """Names of the installed tasks -> module:Class."""
    return {point.name: point.value for point in entry_points(group=GROUP)} | BUILT_IN


@lru_cache
def find_task(name: str) -> Task:
    """The task with a name, or `module:Class`.

    Raises:
        ValueError: unknown name, a module that cannot be imported, or no subclass of Task.
    """
    names = known()
    place = names.get(name, name)
    module, colon, attribute = place.partition(":")
    if not colon:
        raise ValueError(f"method: expected {', '.join(names)} or module:Class of a task of your own, got {name!r}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"method: {place} cannot be imported ({error})") from error
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ValueError(f"method: expected a subclass of softmask.tasks.base.Task, got {place}")
    return found()
