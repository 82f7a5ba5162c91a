"""Triton's interpreter, faster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace


@contextmanager
def fast_interpreter() -> Iterator[None]:
    """Triton's interpreter patches triton.language anew in every call of a helper function: once per launch will do."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, active = interpreter._patch_lang, []

    def restore() -> None:
        while active:
            active.pop().restore()

    def patch_once(fn: object) -> SimpleNamespace:
        if not active:
            active.extend((patch(fn), patch(tl.max.fn)))  # the latter for what Triton's own helpers call
        return SimpleNamespace(restore=restore)

    interpreter._patch_lang = patch_once
    try:
        yield
    finally:
        interpreter._patch_lang = patch
