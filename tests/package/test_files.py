"""softmask.files and softmask.arguments, which all commands share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from softmask.arguments import MOST, count, positive
from softmask.files import write_atomically


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_atomically(path, "first, long")
    write_atomically(path, "größer")
    assert path.read_bytes() == "größer".encode()
    write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert [found.name for found in tmp_path.iterdir()] == ["page.html"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and [found.name for found in tmp_path.iterdir()] == ["page.html"]


def test_the_target_of_a_link_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"


def test_command_line_numbers_are_checked() -> None:
    assert (count("0"), positive("1"), count(str(MOST))) == (0, 1, MOST)
    for check, text, expected in ((count, "-1", "0 to"), (positive, "0", "1 to"), (count, str(MOST + 1), "0 to")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"expected {expected} {MOST}, got {text}"):
            check(text)
    with pytest.raises(ValueError):  # argparse names the option and the text
        count("many")
