"""What scenes of photographs show, sampled from (seed, split, index), and their images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Literal, get_args

from softmask.data.photos.backgrounds import Crop, Photograph, paint, read_photographs, sample_crop
from softmask.data.photos.stamps import Stamp, read_stamps
from softmask.data.scenes.captions import Caption, Group, write_caption_at
from softmask.data.scenes.draw import SUPERSAMPLING, compose, pack_sample
from softmask.data.scenes.drawings import Pose
from softmask.data.scenes.place import place

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

FEWEST = 10
_COUNTS = (1, 1, 2, 2, 2, 2, 2, 3, 3, 3)
_OPENINGS = ("", "", "", "", "", "", "a photo of ", "a picture of ", "there ", "there ")
_UNSEEN_SCENES = 0.5  # share of test scenes with a stamp that occurs in test alone
_TILT = 10.0  # degrees


@dataclass(frozen=True)
class Pictures:
    """All stamps and photographs that scenes are made of."""

    stamps: tuple[Stamp, ...]
    photographs: tuple[Photograph, ...]


@dataclass(frozen=True)
class Scene:
    """Content of an image of any size: numbers of stamps from back to front, with their poses."""

    stamps: tuple[int, ...]
    poses: tuple[Pose, ...]
    crop: Crop
    caption: Caption


@lru_cache(maxsize=1)
def read_pictures(roots: tuple[Path, ...]) -> Pictures:
    """The pictures of the packages in ``roots``, read once per process.

    Raises:
        MissingPackageError: a package is in none of the roots.
        ValueError: too few pictures to make scenes of.
    """
    pictures = Pictures(read_stamps(roots), read_photographs(roots))
    names = {stamp.concept.name for stamp in pictures.stamps if not stamp.unseen}
    unseen = sum(stamp.unseen for stamp in pictures.stamps)
    if len(names) < FEWEST or not unseen or not pictures.photographs:
        expected = f"stamps of at least {FEWEST} things for training, one for test alone and a background"
        came = f"{len(names)}, {unseen} and {len(pictures.photographs)}"
        raise ValueError(f"{', '.join(map(str, roots))}: expected {expected}, got {came}")
    return pictures


def sample_scene(pictures: Pictures, split: Split, index: int, *, seed: int = 0) -> Scene:
    """Scene ``index`` of a split."""
    rng = Random(f"photos/{seed}/{split}/{index}")
    chosen = _choose(pictures.stamps, split, rng)
    stamps = [pictures.stamps[number] for number in chosen]
    poses, boxes = place([stamp.picture.alphas for stamp in stamps], rng, tilt=_TILT)
    crop = sample_crop(pictures.photographs, rng)
    groups = [Group(stamp.concept, (box,)) for stamp, box in zip(stamps, boxes, strict=True)]
    caption = write_caption_at(groups, pictures.photographs[crop.photograph].place, rng, _OPENINGS)
    return Scene(chosen, poses, crop, caption)


def _choose(stamps: Sequence[Stamp], split: Split, rng: Random) -> tuple[int, ...]:
    """Numbers of stamps with distinct phrases; every phrase is equally likely, whatever the number of its stamps."""
    count = rng.choice(_COUNTS)
    with_unseen = split == "test" and rng.random() < _UNSEEN_SCENES
    first = [rng.choice([i for i, stamp in enumerate(stamps) if stamp.unseen])] if with_unseen else []
    by_name: dict[str, list[int]] = {}
    for i, stamp in enumerate(stamps):
        if with_unseen or not stamp.unseen:
            by_name.setdefault(stamp.concept.name, []).append(i)
    for i in first:
        del by_name[stamps[i].concept.name]
    others = [rng.choice(by_name[name]) for name in rng.sample(list(by_name), count - len(first))]
    chosen = first + others
    return tuple(rng.sample(chosen, len(chosen)))


def encode_scene(pictures: Pictures, scene: Scene, split: Split, size: int) -> dict[str, bytes]:
    """Members of a sample: "png", "txt" and "json" (write.py describes it)."""
    stamps = [pictures.stamps[number] for number in scene.stamps]
    canvas = paint(pictures.photographs, scene.crop, size * SUPERSAMPLING)
    image, masks = compose(canvas, [(s.picture.colors, pose) for s, pose in zip(stamps, scene.poses, strict=True)])
    about = [{"concept": stamp.concept.name, "count": 1, "unseen": stamp.unseen} for stamp in stamps]
    return pack_sample(image, scene.caption, masks, about, split)
