"""What the readers of lists share: entries with their checks, the layout of pictures, splits, lines of text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from softmask.data.formats.examples import Example, ExampleSource, choose_layout, root_of
from softmask.data.json_files import read_json, read_json_lines
from softmask.data.records import DataError, LeftOut

T = TypeVar("T")


def read_entries(path: str) -> list[Any]:
    """The entries of a JSON list or of JSON lines, told apart by the first character. Raises DataError."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            start = next((line.lstrip()[:1] for line in file if line.strip()), "")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return read_json(path) if start == "[" else read_json_lines(path)


def usable(entries: Iterable[Any], make: Callable[[dict[str, Any], int], T], left_out: LeftOut) -> list[T]:
    """`make(entry, number)` of every entry; others are counted: no objects, or ones for which it raises ValueError."""
    made = []
    for number, entry in enumerate(entries):
        try:
            if not isinstance(entry, dict):
                raise ValueError(f"expected an object, got {type(entry).__name__}")
            made.append(make(entry, number))
        except ValueError as error:
            left_out.add(f"entry {number}: {error}")
    return made


def text_of(entry: dict[str, Any], key: str) -> str:
    """The text under `key`. Raises ValueError if there is none."""
    text = entry.get(key)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'"{key}" must be a text, got {text!r:.80}')
    return text


def id_of(entry: dict[str, Any], key: str) -> int | str:
    """The number or name under `key`. Raises ValueError if there is none."""
    found = entry.get(key)
    if isinstance(found, bool) or not isinstance(found, int | str):
        raise ValueError(f'"{key}" must be a number or a name, got {found!r:.80}')
    return found


def answered(
    examples: Sequence[tuple[Example, Sequence[str]]], left_out: LeftOut
) -> list[tuple[Example, Sequence[str]]]:
    """Those with a target, if any has one; others are counted. A file without any is of a test split."""
    if all(one.target is None for one, _ in examples):
        return list(examples)
    for one, _ in examples:
        if one.target is None:
            left_out.add(f"{one.key}: without an answer, which others of the file have")
    return [(one, starts) for one, starts in examples if one.target is not None]


def open_lists(
    paths: Sequence[str], make: Callable[[dict[str, Any], int], tuple[Example, Sequence[str]]], *, image_root: str
) -> ExampleSource:
    """The examples of JSON lists and of JSON lines. `make` gives an entry's example, and the possible starts of its
    pictures' paths. Raises DataError."""
    left_out = {path: LeftOut() for path in paths}
    folder = root_of(paths, image_root)
    examples: list[Example] = []
    for path in paths:
        made = usable(read_entries(path), make, left_out[path])
        examples += placed(answered(made, left_out[path]), folder)
    return ExampleSource(examples, paths=paths, image_root=image_root, left_out=left_out)


def placed(examples: Sequence[tuple[Example, Sequence[str]]], folder: str) -> Iterator[Example]:
    """Examples with their pictures where this disk has them.

    Args:
        examples: each with the possible starts of its pictures' paths, in one order for all.
        folder: of relative paths.
    """
    layout = choose_layout(folder, ([start + one.pictures[0] for start in starts] for one, starts in examples))
    for one, starts in examples:
        yield replace(one, pictures=tuple(starts[layout] + picture for picture in one.pictures))


def require_split(path: str, split: str, entries: Iterable[Any], *, also: Sequence[str] = ()) -> None:
    """Raises DataError if no entry of a file is of `split` or of the splits `also`; the message names those it has."""
    found = {entry["split"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("split"), str)}
    if not found:
        raise DataError(f'{path}: expected entries with "split", got none')
    if found.isdisjoint([split, *also]):
        raise DataError(f"{path}: expected one of the splits {', '.join(sorted(found))}, got {split!r}")


def read_lines(path: str) -> list[str]:
    """The lines of a text file without surrounding white space, empty ones at the end apart. Raises DataError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return [line.strip() for line in file.read().rstrip().split("\n")]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at {error.start})") from None
