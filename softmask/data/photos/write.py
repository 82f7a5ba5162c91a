"""Captioned scenes of photographic cut-outs as WebDataset shards, made of pictures in Debian's packages.

    python -m softmask.data.photos --out DIR [--train 20000 --val 512 --test 512 --size 112 --test-size 224 --seed 0]
                                   [--root /]

needs the stamps of ``tuxpaint-stamps-default`` and the photographs of ``scratch`` or ``mate-backgrounds``, installed or
unpacked without root's rights: ``apt-get download PACKAGE && dpkg -x PACKAGE_*.deb ROOT``. ``--root`` takes several
folders, separated by commas. The stamps are under the GPL: generate scenes where you use them.

The folder has the layout of `softmask.data.scenes`: ``{train,val,test}-%06d.tar`` (members KEY.png, KEY.txt, KEY.json),
``ATTRIBUTION.txt``, ``concepts.json`` and the stamp ``scenes.json``. A scene depends only on (seed, split, index) and
the packages, not on its size in pixels or the number of processes. 15 % of the stamps, chosen by a hash of their names,
occur only in test, in half of its scenes; the records of their objects have ``"unseen": true``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from softmask.data.photos.packages import STAMPS
from softmask.data.photos.scene import SPLITS, Pictures, Split, encode_scene, read_pictures, sample_scene
from softmask.data.scenes.captions import name_one
from softmask.data.scenes.folder import Scenes, add_arguments, check_sizes, is_current, run, write_folder

VERSION = 1
"""Incremented when the same options give different files, so that old folders are rewritten."""


@dataclass(frozen=True)
class Options:
    """Scenes per split, sides in pixels (``size`` is that of train and val) and seed.

    Raises:
        ValueError: a count is negative or a side is less than 16.
    """

    train: int = 20000
    val: int = 512
    test: int = 512
    size: int = 112
    test_size: int = 224
    seed: int = 0

    def __post_init__(self) -> None:
        check_sizes(self)


def write_photos(out: Path, options: Options, roots: tuple[Path, ...], *, processes: int) -> bool:
    """Write the folder ``out`` (see the module's docstring). Returns False if it already holds these scenes.

    Raises:
        FileExistsError: ``out`` holds files that this function did not write.
        MissingPackageError: a package is in none of the roots.
    """
    pictures = read_pictures(roots)
    used = [(one.name, one.digest, name_one(one.concept)) for one in pictures.stamps]
    used += [(one.name, one.digest, one.place) for one in pictures.photographs]
    content = hashlib.blake2b(json.dumps(used).encode(), digest_size=16).hexdigest()
    stamp = {"generator": "photos", "version": VERSION, **asdict(options), "pictures": content}
    if is_current(out, stamp):
        return False
    texts = {
        "concepts.json": json.dumps(_concepts(pictures), ensure_ascii=False, indent=1),
        "ATTRIBUTION.txt": attribution(pictures) + "\n",
    }
    write_folder(out, stamp, [_scenes(split, options, roots) for split in SPLITS], texts, processes=processes)
    return True


def _concepts(pictures: Pictures) -> list[dict[str, Any]]:
    """For each thing its name and phrase, and its stamps, of which some are unseen in training."""
    known: dict[str, dict[str, Any]] = {}
    for stamp in pictures.stamps:
        new = {"name": stamp.concept.name, "phrase": name_one(stamp.concept), "stamps": []}
        entry = known.setdefault(stamp.concept.name, new)
        entry["stamps"].append({"file": f"{stamp.name}.png", "unseen": stamp.unseen})
    return list(known.values())


def attribution(pictures: Pictures) -> str:
    """A line for each package whose pictures are used."""
    packages = dict.fromkeys(photograph.package for photograph in pictures.photographs)
    return "\n".join(package.licence for package in (STAMPS, *packages))


def _scenes(split: Split, options: Options, roots: tuple[Path, ...]) -> Scenes:
    size = options.test_size if split == "test" else options.size
    return Scenes(split, getattr(options, split), size, partial(_sample, roots, split, size, options.seed))


def _sample(roots: tuple[Path, ...], split: Split, size: int, seed: int, index: int) -> dict[str, bytes]:
    pictures = read_pictures(roots)  # kept by each process
    return encode_scene(pictures, sample_scene(pictures, split, index, seed=seed), split, size)


def _roots(text: str) -> tuple[Path, ...]:
    """Folders, comma-separated."""
    folders = tuple(Path(part).absolute() for part in text.split(",") if part)
    if not folders:
        raise argparse.ArgumentTypeError("expected a folder")
    return folders


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0 on success, 1 after an error, which is printed as one line."""
    parser = argparse.ArgumentParser(
        prog="python -m softmask.data.photos", description="Write captioned scenes of photographic cut-outs."
    )
    for name, value in asdict(Options()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}")
    parser.add_argument(
        "--root", type=_roots, default=(Path("/"),), help="where the packages are, comma-separated (default /)"
    )
    add_arguments(parser)
    parsed = vars(parser.parse_args(arguments))
    out, roots, processes = (parsed.pop(name) for name in ("out", "root", "processes"))
    out = out.absolute()
    return run(
        out,
        lambda: write_photos(out, Options(**parsed), roots, processes=processes),
        lambda: attribution(read_pictures(roots)),
    )
