"""Many strings in two buffers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class Texts:
    """Many strings in two buffers, which forked workers share without copying."""

    def __init__(self, texts: Iterable[str]):
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __getitem__(self, index: int) -> str:
        return self._bytes[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass")
