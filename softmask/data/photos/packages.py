"""Debian packages that the pictures come from, installed or unpacked by `dpkg -x`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class MissingPackageError(ValueError):
    """A package that is in none of the roots; the message says how to get it."""


@dataclass(frozen=True)
class Package:
    """``folder`` is where its pictures lie in a root, ``licence`` a line for ATTRIBUTION.txt."""

    name: str
    folder: str
    licence: str

    def find(self, roots: Sequence[Path]) -> Path | None:
        """The folder in the first root that has it; None if none has."""
        return next((root / self.folder for root in roots if (root / self.folder).is_dir()), None)

    def missing(self, roots: Sequence[Path]) -> MissingPackageError:
        fetch = f"`apt-get download {self.name} && dpkg -x {self.name}_*.deb DIR`, then --root DIR"
        others = f" (also looked for in {', '.join(map(str, roots[1:]))})" if roots[1:] else ""
        return MissingPackageError(f"{roots[0] / self.folder}: no such folder{others}; run {fetch}")


STAMPS = Package(
    "tuxpaint-stamps-default",
    "usr/share/tuxpaint/stamps",
    "Stamps of Tux Paint, 2002-2022 by Bill Kendrick and contributors, GPL-2 (Debian's tuxpaint-stamps-default)",
)
SCRATCH = Package(
    "scratch",
    "usr/share/scratch/Media/Backgrounds",
    "Backgrounds of Scratch 1.4, (c) 2011 Massachusetts Institute of Technology, CC BY-SA 3.0 (Debian's scratch)",
)
MATE = Package(
    "mate-backgrounds",
    "usr/share/backgrounds/mate/nature",
    "Backgrounds of MATE by the photographers in its AUTHORS file, GPL-2+ (Debian's mate-backgrounds)",
)
