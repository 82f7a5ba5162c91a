"""Files that are replaced whole or not at all, and the cache."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """The folder for what can be made again: `softmask/KIND` in XDG_CACHE_HOME, or else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softmask" / kind


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) beside `path`, then rename it.

    Readers never see half a file, nor does a killed process leave one. Several processes may write the same path. A
    link's target is replaced, not the link.
    """
    path = path.resolve()
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
