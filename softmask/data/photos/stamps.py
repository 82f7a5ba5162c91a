"""Stamps of Tux Paint that are photographs, and the phrases that name them.

Names and folders in `_LEFT_OUT` were found by looking at contact sheets of all stamps. Left out are also SVGs (all are
drawn), stamps that are smaller than `_LEAST_SIDE`, nearly transparent or not cut out, and those whose line is no noun
phrase ("Boom!!!") unless `_PHRASES` has one for them.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import cast

from PIL import Image

from softmask.data.photos.packages import STAMPS
from softmask.data.scenes.concepts import Concept, Form
from softmask.data.scenes.drawings import OPAQUE, Drawing, pyramid

UNSEEN_SHARE = 0.15
_LONGEST_SIDE = 256  # pixels to which large stamps are reduced: an object of a 224-pixel image, drawn at twice its size
_LEAST_SIDE = 40  # pixels of the longer side
_LEAST_FILLED = 0.1  # share of opaque pixels in the stamp's box
_FAINT = 32  # alpha below which the margin is cropped

_LEFT_OUT = {
    "drawn": """
        */cartoon/* animals/insects/bee animals/mammals/echidna animals/mammals/hedgehog
        clothes/button clothes/hats/* clothes/t_* food/pizza household/arttools/highlighter household/key
        household/tools/wrench_adjustable medical/tooth people/body_parts/* seasonal/christmas/Santa
        seasonal/christmas/bow seasonal/christmas/candy_cane seasonal/christmas/hard_candy seasonal/christmas/lamp
        seasonal/christmas/santahat seasonal/christmas/star seasonal/christmas/stocking seasonal/christmas/tree
        seasonal/christmas/xmas_tp_bulb seasonal/easter/* seasonal/hanukkah/* seasonal/newyears/*
        town/monuments/inukshuk-outline vehicles/7spoke256 vehicles/ship/chineseJunk""",
    "symbols, letters and money": "symbols/* town/flags/* town/roadsigns/* vehicles/emergency/sedan_police",
    "gravestones, which nobody can tell apart by their names, and drawings": "seasonal/halloween/*",
    "half transparent": "animals/insects/fly naturalforces/* space/planets/0_sun",
    "mirrored or second copies": "*_mirror military/fireman240a",
}
"""Why -> names of stamps, with wildcards."""

_PHRASES = {
    # The stamp's line tells something about it instead.
    "animals/insects/hoverfly": "a hoverfly",
    "animals/fish/bluegroper": "a blue groper",
    "animals/mammals/bears/toys/edward_bear": "a teddy bear",
    "animals/mammals/wildboar": "a wild boar with its young",
    "food/vegetables/broccoli": "some broccoli",
    "food/vegetables/corn": "an ear of yellow corn",
    "household/toilet": "a toilet",
    "household/tools/measuring_tape": "a measuring tape",
    "medical/stethoscope": "a stethoscope",
    "military/vehicles/bradley": "a Bradley fighting vehicle",
    "people/toys/grannysmith": "an old rag doll",
    "plants/flowers/adeenia": "an adenium flower",
    "plants/flowers/anthoorium": "an anthurium flower",
    "plants/flowers/appooppanthady": "an Indian milkweed",
    "plants/flowers/bolsom": "a balsam flower",
    "plants/flowers/chemparathi": "a hibiscus flower",
    "plants/flowers/plastic/chuvanna_plastic_poo": "a red plastic flower",
    "plants/trees/birch": "a birch in winter",
    "plants/trees/holly_leaves": "some holly leaves",
    "plants/trees/rambutan": "a bunch of rambutan",
    "seasonal/christmas/Candy_cane_photo_1": "a candy cane",
    "seasonal/christmas/Candy_cane_photo_2": "a candy cane",
    "seasonal/christmas/Christmas_pudding": "a Christmas pudding",
    "seasonal/christmas/German_Christmas_toy": "a wooden toy from Germany",
    "seasonal/christmas/Mince_Pie": "a mince pie",
    "seasonal/christmas/Roast_turkey": "a roast turkey",
    "space/moon/moon_3qt": "the moon",
    "space/moon/moon_crescent": "the crescent moon",
    "space/planets/1_mercury": "Mercury",
    "space/planets/2_venus": "Venus",
    "space/planets/4_mars": "Mars",
    "space/planets/5_jupiter": "Jupiter",
    "space/planets/6_saturn": "Saturn",
    "space/planets/7_uranus": "Uranus",
    "space/planets/8_neptune": "Neptune",
    "space/planets/9_pluto": "Pluto",
    # It speaks of a size, but scenes show things at any size.
    "animals/mammals/rabbit_little": "a rabbit",
    "food/vegetables/pumpkin_small": "a pumpkin",
    "household/dishes/pitcher_small": "a pitcher",
    "household/tools/mallet_metal": "a metal mallet",
    "household/tools/paintbrush_large": "a paintbrush",
    # Grammar and spelling.
    "animals/mammals/bovines/mountaingoat": "a mountain goat",
    "animals/mammals/bears/european-bear": "a European bear",
    "animals/mammals/hippopotamus": "a hippopotamus",
    "food/spices/ginger": "a ginger root",
    "food/vegetables/tomato": "a ripe red tomato",
}


@dataclass(frozen=True)
class Stamp:
    """A photographic cut-out: ``name`` is its path among the stamps, ``digest`` that of its file."""

    name: str
    concept: Concept
    picture: Drawing
    digest: str

    @cached_property
    def unseen(self) -> bool:
        """Whether it occurs in test alone; depends on its file's name."""
        digest = hashlib.blake2b(f"{self.name}.png".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < UNSEEN_SHARE * 2**64


def read_stamps(roots: Sequence[Path]) -> tuple[Stamp, ...]:
    """All photographic stamps, sorted by name.

    Raises:
        MissingPackageError: no root has the package.
        OSError: a file that cannot be read.
    """
    folder = STAMPS.find(roots)
    if folder is None:
        raise STAMPS.missing(roots)
    return tuple(_read(folder))


def _read(folder: Path) -> Iterator[Stamp]:
    for path in sorted(folder.rglob("*.png")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        concept = None if reason_left_out(name) else concept_of(name, _first_line(path.with_suffix(".txt")))
        if concept is None:
            continue
        content = path.read_bytes()
        image = _cut_out(Image.open(io.BytesIO(content)))
        if image is not None:
            yield Stamp(name, concept, pyramid(image), hashlib.blake2b(content, digest_size=16).hexdigest())


def reason_left_out(name: str) -> str | None:
    """Why a stamp is left out by its name; None if it is not."""
    for reason, patterns in _LEFT_OUT.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns.split()):
            return reason
    return None


def concept_of(name: str, line: str) -> Concept | None:
    """The concept of a stamp by its first line, up to a comma or the sentence's end; None if that is no noun phrase."""
    phrase = re.sub('[“”"]', "", re.split("[.,!?(—]", line)[0]).replace("’", "'").strip()
    if name not in _PHRASES and not re.match("(An?|Some|The) ", phrase):
        return None
    phrase = _PHRASES.get(name, phrase)
    article, _, noun = phrase.partition(" ")
    if article.lower() not in ("a", "an", "some", "the"):
        article, noun = "", phrase
    return Concept(noun, noun, cast(Form, article.lower()), "")


def _first_line(path: Path) -> str:
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return text.partition("\n")[0]


def _cut_out(image: Image.Image) -> Image.Image | None:
    """The stamp without its margin, at most `_LONGEST_SIDE` pixels long; None if it is too small or transparent."""
    image = image.convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha >= _FAINT)).getbbox()
    if box is None or max(box[2] - box[0], box[3] - box[1]) < _LEAST_SIDE:
        return None
    image = image.crop(box)
    opaque = sum(image.getchannel("A").histogram()[OPAQUE:])
    if opaque < _LEAST_FILLED * image.width * image.height or image.getchannel("A").getextrema()[0] == 255:
        return None
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    return image
