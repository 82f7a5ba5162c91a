"""Named ranges of a training step: what profilers show and benchmarks time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch.profiler import record_function

PREFIX = "softmask/"

Observer = Callable[[str], AbstractContextManager]

_observer: Observer = nullcontext


@contextmanager
def named_range(name: str) -> Iterator[None]:
    """A range `softmask/NAME` for torch.profiler; around a block of code, or as a function's decorator."""
    with record_function(PREFIX + name), _observer(name):
        yield


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Enter `observer(name)` around every range, for measurements that a profiler would disturb."""
    global _observer
    previous, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = previous
