"""Types of command-line arguments, for `argparse`."""

from __future__ import annotations

import argparse

MOST = 2**31 - 1


def count(text: str, least: int = 0) -> int:
    """An integer from `least` to `MOST`."""
    number = int(text)
    if not least <= number <= MOST:
        raise argparse.ArgumentTypeError(f"expected {least} to {MOST}, got {number}")
    return number


def positive(text: str) -> int:
    """An integer from 1 to `MOST`."""
    return count(text, least=1)
