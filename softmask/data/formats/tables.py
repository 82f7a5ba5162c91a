"""Captioned images in tables: .csv and .tsv files with a line of column names, as open_clip reads them.

A table whose first line has a tab is separated by tabs, whatever its name: open_clip's default for .csv.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import TextIO

from softmask.data.records import DataError, LeftOut
from softmask.lfs import NOT_THE_FILE, is_pointer

LONGEST = 2**31 - 1  # characters of a field; the largest limit that csv takes on every system


def table_entries(
    path: str, *, image_column: str, caption_column: str, left_out: LeftOut
) -> Iterator[tuple[str, list[str]]]:
    """Image path and caption of every usable row.

    Raises:
        DataError: the file is no table, or lacks a column.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from _entries(path, file, (image_column, caption_column), left_out)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason})") from None


def _entries(path: str, file: TextIO, columns: tuple[str, str], left_out: LeftOut) -> Iterator[tuple[str, list[str]]]:
    first = file.readline()
    if is_pointer(first.encode("utf-8")):
        raise DataError(f"{path} {NOT_THE_FILE}")
    separator = "\t" if "\t" in first else ","
    header = [name.strip() for name in next(csv.reader([first], delimiter=separator), [])]
    if missing := [column for column in columns if column not in header]:
        raise DataError(
            f'{path}: expected the columns "{columns[0]}" and "{columns[1]}", got {", ".join(header)[:200]!r} without '
            f'"{missing[0]}"; image_column and caption_column name others'
        )
    image_at, caption_at = map(header.index, columns)
    for line, row in _rows(path, file, separator):
        if len(row) != len(header):
            left_out.add(f"line {line}: expected {len(header)} fields, got {len(row)}")
        elif not row[image_at].strip():
            left_out.add(f'line {line}: "{columns[0]}" is empty')
        else:
            yield row[image_at].strip(), [row[caption_at]]


def _rows(path: str, file: TextIO, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Fields of every row that is not empty, and the number of its last line."""
    csv.field_size_limit(LONGEST)  # of the process: csv has no other
    reader = csv.reader(file, delimiter=separator)
    try:
        for row in reader:
            if row:
                yield reader.line_num + 1, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num + 1}: {error}") from None
