"""Pointers that git-lfs leaves in place of files that were not fetched."""

from __future__ import annotations

import os

POINTER = b"version https://git-lfs.github.com/spec/"
NOT_THE_FILE = "is a pointer of git-lfs, not the file: run git lfs pull"


def is_pointer(content: bytes) -> bool:
    return content.startswith(POINTER)


def refuse_pointer(path: str | os.PathLike, key: str) -> None:
    """Refuse a file that is a pointer.

    Raises:
        ValueError: a pointer; the message starts with `key`.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        if is_pointer(file.read(len(POINTER))):
            raise ValueError(f"{key}: {path} {NOT_THE_FILE}")
