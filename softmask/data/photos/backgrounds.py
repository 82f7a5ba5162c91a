"""Photographs behind the stamps, chosen by hand, with the place that their file's name gives."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image

from softmask.data.photos.packages import MATE, SCRATCH, Package

LEAST_AREA = 0.4  # of the photograph, which a scene shows
_SHORT_SIDE = 480  # pixels to which large photographs are reduced

# Files of each package: photographs without text, logos and paintings. A place is named if the file's name gives a
# plain noun phrase and every crop shows it.
_PHOTOGRAPHS: dict[Package, str] = {
    SCRATCH: """
        Indoors/chalkboard.jpg: in front of a chalkboard
        Indoors/clothing-store.jpg: in a clothing store
        Indoors/hall.jpg: in a hall
        Indoors/kitchen.jpg: in a kitchen
        Nature/beach-malibu.jpg: on a beach
        Nature/canyon.jpg: in a canyon
        Nature/flower-bed.jpg: by a flower bed
        Nature/flowers.gif:
        Nature/forest.jpg: in a forest
        Nature/garden-rock.jpg: in a garden
        Nature/grand-canyon.jpg:
        Nature/gravel-desert.jpg: in a desert
        Nature/hill.jpg: on a hill
        Nature/lake.jpg: by a lake
        Nature/moon.jpg: on the moon
        Nature/pathway.jpg: on a pathway
        Nature/tree.jpg: by a tree
        Nature/water-and-rocks.jpg: by water and rocks
        Nature/wave.jpg: in front of a wave
        Outdoors/atom-playground.jpg: in a playground
        Outdoors/bench-with-view.jpg:
        Outdoors/boardwalk.jpg:
        Outdoors/brick-wall-and-stairs.jpg: in front of a brick wall
        Outdoors/brick-wall2.jpg: in front of a brick wall
        Outdoors/building-at-mit.jpg: in front of a building
        Outdoors/castle.jpg: in front of a castle
        Outdoors/city-with-water.jpg: by a city
        Outdoors/city-with-water2.jpg: by a city
        Outdoors/driveway.jpg:
        Outdoors/hallway_outdoors.jpg: in a hallway
        Outdoors/hay_field.jpg: in a hay field
        Outdoors/houses.jpg: by houses
        Outdoors/mansion.jpg: in front of a mansion
        Outdoors/parking-ramp.jpg: by a parking ramp
        Outdoors/pool.jpg: by a pool
        Outdoors/route66.jpg: on a road
        Outdoors/silos.jpg: by silos
        Outdoors/train-tracks1.jpg: on train tracks
        Outdoors/train-tracks2.jpg: on train tracks
        Outdoors/village.jpg: in a village
        Outdoors/wooden-house.jpg: in front of a wooden house
        Sports/baseball-field.jpg: on a baseball field
        Sports/basketball-court1-a.jpg: on a basketball court
        Sports/basketball-court1-b.jpg: on a basketball court
        Sports/football-field.jpg: on a football field
        Sports/playing-field.jpg: on a playing field
        Sports/tennis-backboard.jpg:
    """,
    MATE: """
        Aqua.jpg:
        Blinds.jpg:
        Dune.jpg:
        FreshFlower.jpg:
        Garden.jpg:
        GreenMeadow.jpg: in a green meadow
        LadyBird.jpg:
        RainDrops.jpg:
        Storm.jpg: in a storm
        TwoWings.jpg:
        Wood.jpg:
        YellowFlower.jpg:
    """,
}


@dataclass(frozen=True)
class Photograph:
    """A background; ``place`` is what captions say of it, "" for nothing, ``digest`` that of its file."""

    package: Package
    name: str
    place: str
    image: Image.Image
    digest: str


@dataclass(frozen=True)
class Crop:
    """A square of a photograph, in pixels of its reduced image."""

    photograph: int
    left: float
    top: float
    side: float


def read_photographs(roots: Sequence[Path]) -> tuple[Photograph, ...]:
    """The listed photographs of all packages that are there.

    Raises:
        MissingPackageError: no root has any of the packages.
        OSError: a file that cannot be read.
    """
    folders = {package: folder for package in _PHOTOGRAPHS if (folder := package.find(roots)) is not None}
    if not folders:
        raise SCRATCH.missing(roots)
    return tuple(
        _read(package, folder, *line.strip().split(":"))
        for package, folder in folders.items()
        for line in _PHOTOGRAPHS[package].strip().splitlines()
        if (folder / line.strip().split(":")[0]).is_file()
    )


def _read(package: Package, folder: Path, name: str, place: str) -> Photograph:
    content = (folder / name).read_bytes()
    image = Image.open(io.BytesIO(content)).convert("RGB")
    scale = min(1, _SHORT_SIDE / min(image.size))
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    return Photograph(package, name, place.strip(), image, digest)


def sample_crop(photographs: Sequence[Photograph], rng: Random) -> Crop:
    """A random square of a random photograph, `LEAST_AREA` of it or more where its shape allows that."""
    number = rng.randrange(len(photographs))
    width, height = photographs[number].image.size
    longest = min(width, height)
    side = rng.uniform(min(longest, math.sqrt(LEAST_AREA * width * height)), longest)
    return Crop(number, rng.uniform(0, width - side), rng.uniform(0, height - side), side)


def paint(photographs: Sequence[Photograph], crop: Crop, side: int) -> Image.Image:
    """The crop as an image of ``side`` pixels."""
    box = (crop.left, crop.top, crop.left + crop.side, crop.top + crop.side)
    return photographs[crop.photograph].image.resize((side, side), Image.Resampling.BICUBIC, box=box)
