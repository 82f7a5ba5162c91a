"""Files of downstream tasks for the tests of softmask.data.formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.data_files import make_image


def write_json(path: Path, tree: Any) -> str:
    path.write_text(json.dumps(tree))
    return str(path)


def write_lines(path: Path, entries: list) -> str:
    """JSON lines."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def write_pictures(folder: Path, *names: str) -> dict[str, bytes]:
    """Pictures that all differ; name -> bytes."""
    contents = {name: make_image(seed, size=(4, 4)) for seed, name in enumerate(names)}
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return contents
