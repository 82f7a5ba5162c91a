"""JSON files that users name; what is wrong with one is a DataError of one line."""

from __future__ import annotations

import json
from typing import Any

from softmask.data.records import DataError
from softmask.lfs import NOT_THE_FILE, is_pointer


def read_json(path: str) -> Any:
    """The content of a JSON file. Raises DataError if it cannot be read or is not JSON."""
    try:
        return json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {' '.join(str(error).split())}") from None


def read_json_lines(path: str) -> list[Any]:
    """The objects of a file with one on every line, empty lines apart. Raises DataError as `read_json`."""
    objects = []
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if line.strip():
            try:
                objects.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: is not JSON: {' '.join(str(error).split())}") from None
    return objects


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not JSON: not UTF-8 ({error.reason} at {error.start})") from None
    if is_pointer(text[:100].encode("utf-8", "surrogatepass")):
        raise DataError(f"{path} {NOT_THE_FILE}")
    return text
