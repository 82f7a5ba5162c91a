"""A list of modules of one type."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar, cast

from torch import nn

M = TypeVar("M", bound=nn.Module)


class Modules(nn.ModuleList, Generic[M]):
    """nn.ModuleList whose items have a type that checkers and editors know."""

    def __iter__(self) -> Iterator[M]:
        return cast(Iterator[M], super().__iter__())

    def at(self, index: int) -> M:
        return cast(M, self[index])
