"""Captioned scenes of drawings as WebDataset shards: training data that needs no network.

    python -m softmask.data.scenes --out DIR [--train 40000 --val 512 --test 512 --size 64 --test-size 256 --seed 0]

writes ``DIR/{train,val,test}-%06d.tar`` (members KEY.png, KEY.txt, KEY.json), ``DIR/ATTRIBUTION.txt``,
``DIR/concepts.json`` and the stamp ``DIR/scenes.json``. A scene depends only on (seed, split, index) and its artists,
not on its size in pixels or the number of processes. A tenth of the concept pairs, chosen by a hash of their names,
occurs only in test, in about half of its scenes.

    python -m softmask.data.scenes --out DIR --artists openmoji,noto [--val-artists emojione --test-artists twemoji]

draws training's scenes with several hands, and validation's and test's with hands that training never sees. It adds
``seen-%06d.tar``: the scenes of test, drawn by training's hands. ``--singles 50`` gives half of training's scenes a
single drawing and a caption that names it without its background: a concept is learned more easily from them than from
scenes of several. ``--varied 100`` bends, recolours, shades and outlines training's drawings at random (looks.py), so
that fewer are learned by heart.

The .json of a sample is ``{"caption", "objects": [{"phrase", "span": [start, end], "mask": {"size": [h, w], "counts"},
"concept", "count"}], "split"}``. Spans count characters of the caption. Masks are `softmask.data.rle` codes of the
visible pixels of all drawings that the phrase names; `count` is the number of these drawings.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from softmask.data.scenes.artists import drawing_set, sets_of, vendor_of
from softmask.data.scenes.captions import name_one
from softmask.data.scenes.concepts import concepts
from softmask.data.scenes.draw import encode_sample
from softmask.data.scenes.folder import Scenes, add_arguments, check_sizes, is_current, run, write_folder
from softmask.data.scenes.layout import SPLITS, Hands, Scene, Split, drawn_concepts, sample_scene

VERSION = 7
"""Incremented when the same options give different files, so that old folders are rewritten."""

FEWEST_CONCEPTS = 10


@dataclass(frozen=True)
class Options:
    """Everything the files depend on: scenes per split, sides in pixels (``size`` is that of train and val), seed,
    artists, the percentage of training's scenes that have a single drawing beside those that have one anyway, and the
    percentage of training's drawings that get another look. With OpenMoji alone there is one hand for all splits; with
    others, emojione draws validation and twemoji test by default.

    Raises:
        ValueError: a count is negative, a side is less than 16, a share is no percentage, or a hand of training draws
            validation or test.
    """

    train: int = 40000
    val: int = 512
    test: int = 512
    size: int = 64
    test_size: int = 256
    seed: int = 0
    artists: tuple[str, ...] = ("openmoji",)
    val_artists: tuple[str, ...] = ()
    test_artists: tuple[str, ...] = ()
    singles: int = 0
    varied: int = 0

    def __post_init__(self) -> None:
        check_sizes(self)
        for name in ("singles", "varied"):
            if not 0 <= getattr(self, name) <= 100:
                raise ValueError(f"{name}: expected 0 to 100 percent, got {getattr(self, name)}")
        for split in ("val", "test"):
            trained = {vendor_of(name) for hand in self.hands("train") for name in hand}
            drawing = [name for hand in self.hands(split) for name in hand]
            again = sorted(name for name in drawing if vendor_of(name) in trained and self.unseen)
            if again:
                raise ValueError(f"{split}_artists: expected hands that do not draw train, got {', '.join(again)}")

    @property
    def unseen(self) -> bool:
        """Whether other hands draw validation and test."""
        return bool(self.artists != ("openmoji",) or self.val_artists or self.test_artists)

    def hands(self, split: Split) -> Hands:
        """The artists who draw a split."""
        if split in ("train", "seen") or not self.unseen:
            return sets_of(self.artists)
        if split == "val":
            return sets_of(self.val_artists or ("emojione",))
        return sets_of(self.test_artists or ("twemoji",))

    def count(self, split: Split) -> int:
        return (self.test if self.unseen else 0) if split == "seen" else getattr(self, split)


def write_scenes(out: Path, options: Options, *, processes: int) -> bool:
    """Write the folder ``out`` (see the module's docstring). Returns False if it already holds these scenes.

    Raises:
        FileExistsError: ``out`` holds files that this function did not write.
    """
    stamp = json.loads(json.dumps({"version": VERSION, **asdict(options)}))
    if is_current(out, stamp):
        return False
    for name in sets_used(options):
        drawing_set(name)  # fetched here, not in several processes at once
    _check_drawn(options)
    write_folder(out, stamp, [_scenes(split, options) for split in SPLITS], texts_beside(options), processes=processes)
    return True


def _check_drawn(options: Options) -> None:
    """ValueError for artists who have drawn too few concepts: sampling would look for others without end."""
    for split in SPLITS:
        drawn = len(drawn_concepts(options.hands(split)))
        if options.count(split) and drawn < FEWEST_CONCEPTS:
            expected = f"drawings of at least {FEWEST_CONCEPTS} of the {len(concepts())} concepts"
            raise ValueError(f"artists of {split}: expected {expected}, got {drawn}; name other artists")


def texts_beside(options: Options) -> dict[str, str]:
    """Name -> content of the texts in a folder of scenes."""
    known = [asdict(concept) | {"phrase": name_one(concept)} for concept in concepts()]
    return {
        "concepts.json": json.dumps(known, ensure_ascii=False, indent=1),
        "ATTRIBUTION.txt": attribution(options) + "\n",
    }


def sets_used(options: Options) -> list[str]:
    """Names of all sets of drawings that appear, each once."""
    return list(dict.fromkeys(name for split in SPLITS for hand in options.hands(split) for name in hand))


def attribution(options: Options) -> str:
    """A line for each set of drawings."""
    return "\n".join(drawing_set(name).attribution for name in sets_used(options))


def _scenes(split: Split, options: Options) -> Scenes:
    size = options.test_size if split in ("test", "seen") else options.size
    hands, shares = options.hands(split), {"singles": options.singles, "varied": options.varied}
    sample = partial(sample_scene, split, seed=options.seed, hands=hands, **shares)
    make = partial(_encode, sample, split, size)
    return Scenes(split, options.count(split), size, make)


def _encode(sample: Callable[[int], Scene], split: Split, size: int, index: int) -> dict[str, bytes]:
    return encode_sample(sample(index), split, size)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def options_parser(
    prog: str, description: str, defaults: Options, *, left_out: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """A parser of ``defaults``' fields, but those ``left_out``, and of the folder to write."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    for name, value in asdict(defaults).items():
        option = f"--{name.replace('_', '-')}"
        if name in left_out:
            continue
        if isinstance(value, int):
            parser.add_argument(option, type=int, default=value, help=f"default {value}")
        else:
            default = ",".join(value) or {"val_artists": "emojione", "test_artists": "twemoji"}[name] + " beside others"
            parser.add_argument(option, type=_names, default=value, help=f"names, comma-separated (default {default})")
    add_arguments(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0 on success, 1 after an error, which is printed as one line."""
    parser = options_parser(
        "python -m softmask.data.scenes",
        "Write captioned scenes; with --tasks, which has its own --help, files of downstream tasks.",
        Options(),
    )
    parsed = vars(parser.parse_args(arguments))
    out, processes = parsed.pop("out").absolute(), parsed.pop("processes")
    return run(
        out,
        lambda: write_scenes(out, Options(**parsed), processes=processes),
        lambda: attribution(Options(**parsed)),
    )
