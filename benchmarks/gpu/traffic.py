"""Counts the bytes that kernels move and the products that they compute, while Triton's interpreter runs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from triton.runtime.interpreter import interpreter_builder

from softmask.kernels._launch import Launch, hooked


@dataclass
class Traffic:
    """Traffic of one launch or of several: bytes loaded and stored, floating-point operations of products.

    An address that several lanes of one load access counts once; one that two loads or two programs read counts twice,
    although a GPU may find it in a cache. Products count with the padding of their tiles.
    """

    kernel: str = ""
    loaded: int = 0
    stored: int = 0
    flops: int = 0

    @property
    def moved(self) -> int:
        return self.loaded + self.stored


@contextmanager
def counted(architecture: int) -> Iterator[list[Traffic]]:
    """One Traffic per launch, with the configurations of an architecture."""
    launches: list[Traffic] = []

    def run(one: Launch) -> None:
        launches.append(Traffic(one.kernel.__name__))
        with _counting(launches[-1]):
            one.run()

    with hooked(run, architecture=architecture):
        yield launches


@contextmanager
def _counting(traffic: Traffic) -> Iterator[None]:
    builder = interpreter_builder
    names = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_dot")
    load, store, atomic, dot = (getattr(builder, name) for name in names)

    def counted_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        result = load(pointers, mask, *rest)
        traffic.loaded += _bytes(pointers, mask, result)
        return result

    def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.stored += _bytes(pointers, mask, value)
        return store(pointers, value, mask, *rest)

    def counted_atomic(operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        size = _bytes(pointers, mask, value)
        traffic.loaded, traffic.stored = traffic.loaded + size, traffic.stored + size
        return atomic(operation, pointers, value, mask, *rest)

    def counted_dot(a: Any, b: Any, *rest: Any) -> Any:
        traffic.flops += 2 * prod(a.data.shape) * b.data.shape[-1]
        return dot(a, b, *rest)

    # Attributes of this one builder hide its methods until they are deleted.
    for name, counted_one in zip(names, (counted_load, counted_store, counted_atomic, counted_dot), strict=True):
        setattr(builder, name, counted_one)
    try:
        yield
    finally:
        for name in names:
            delattr(builder, name)


def _bytes(pointers: Any, mask: Any, value: Any) -> int:
    live = np.broadcast_to(mask.data, pointers.data.shape)
    return np.unique(pointers.data[live]).size * value.data.dtype.itemsize
