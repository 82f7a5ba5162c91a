"""Captioned scenes of drawings as WebDataset shards: training data that needs no network.

    python -m softmask.data.scenes --out DIR [--train 40000 --val 512 --test 512 --size 64 --test-size 256 --seed 0]

writes ``DIR/{train,val,test}-%06d.tar`` (members KEY.png, KEY.txt, KEY.json), ``DIR/ATTRIBUTION.txt``,
``DIR/concepts.json`` and the stamp ``DIR/scenes.json``. A scene depends only on (seed, split, index) and its artists,
not on its size in pixels or the number of processes. A tenth of the concept pairs, chosen by a hash of their names,
occurs only in test, in about half of its scenes.

    python -m softmask.data.scenes --out DIR --artists openmoji,noto [--val-artists emojione --test-artists twemoji]

draws training's scenes with several hands, and validation's and test's with hands that training never sees. It adds
``seen-%06d.tar``: the scenes of test, drawn by training's hands.

The .json of a sample is ``{"caption", "objects": [{"phrase", "span": [start, end], "mask": {"size": [h, w], "counts"},
"concept", "count"}], "split"}``. Spans count characters of the caption. Masks are `softmask.data.rle` codes of the
visible pixels of all drawings that the phrase names; `count` is the number of these drawings.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import webdataset

from softmask.arguments import positive
from softmask.data.scenes.artists import drawing_set, sets_of
from softmask.data.scenes.captions import name_one
from softmask.data.scenes.concepts import concepts
from softmask.data.scenes.draw import encode_sample
from softmask.data.scenes.layout import SPLITS, Hands, Split, drawn_concepts, sample_scene

VERSION = 6
"""Incremented when the same options give different files, so that old folders are rewritten."""

SHARD_SAMPLES = 5000
FEWEST_CONCEPTS = 10


@dataclass(frozen=True)
class Options:
    """Everything the files depend on: scenes per split, sides in pixels (``size`` is that of train and val), seed and
    artists. With OpenMoji alone there is one hand for all splits; with others, emojione draws validation and twemoji
    test by default.

    Raises:
        ValueError: a count is negative, a side is less than 16, or a hand of training draws validation or test.
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

    def __post_init__(self) -> None:
        for name, least in (("train", 0), ("val", 0), ("test", 0), ("size", 16), ("test_size", 16)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for split in ("val", "test"):
            trained = {name for hand in self.hands("train") for name in hand}
            again = sorted(name for hand in self.hands(split) for name in hand if name in trained and self.unseen)
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


@dataclass(frozen=True)
class Shard:
    """One shard to write: scenes [start, stop) of a split."""

    path: Path
    split: Split
    start: int
    stop: int
    size: int
    seed: int
    hands: Hands

    @property
    def cost(self) -> int:
        return (self.stop - self.start) * self.size


def _write_shard(shard: Shard) -> None:
    with shard.path.open("wb") as stream:
        # Fixed owner and time: the same scenes give the same bytes.
        writer = webdataset.TarWriter(stream, user="softmask", group="softmask", mtime=0, encoder=False)
        for index in range(shard.start, shard.stop):
            scene = sample_scene(shard.split, index, seed=shard.seed, hands=shard.hands)
            sample = encode_sample(scene, shard.split, shard.size)
            writer.write({"__key__": f"{index:08d}", **sample})
        writer.close()


def write_scenes(out: Path, options: Options, *, processes: int) -> bool:
    """Write the folder ``out`` (see the module's docstring). Returns False if it already holds these scenes.

    Everything is written beside ``out`` and renamed at the end, so that a folder with a stamp is complete.

    Raises:
        FileExistsError: ``out`` holds files that this function did not write.
    """
    stamp = json.loads(json.dumps({"version": VERSION, **asdict(options)}))
    if _is_current(out, stamp):
        return False
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards = [shard for split in SPLITS for shard in _shards(partial, split, options)]
    for name in sets_used(options):
        drawing_set(name)  # fetched here, not in several processes at once
    _check_drawn(options)
    with multiprocessing.Pool(max(1, min(processes, len(shards)))) as pool:
        # Largest first, so that no process is left with a long job while the others idle.
        for _ in pool.imap_unordered(_write_shard, sorted(shards, key=lambda shard: -shard.cost)):
            pass
    known = [asdict(concept) | {"phrase": name_one(concept)} for concept in concepts()]
    (partial / "concepts.json").write_text(json.dumps(known, ensure_ascii=False, indent=1), encoding="utf-8")
    (partial / "ATTRIBUTION.txt").write_text(attribution(options) + "\n", encoding="utf-8")
    files = sorted(path.name for path in partial.iterdir())
    (partial / "scenes.json").write_text(json.dumps({**stamp, "files": files}, indent=1), encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    return True


def _check_drawn(options: Options) -> None:
    """ValueError for artists who have drawn too few concepts: sampling would look for others without end."""
    for split in SPLITS:
        drawn = len(drawn_concepts(options.hands(split)))
        if options.count(split) and drawn < FEWEST_CONCEPTS:
            expected = f"drawings of at least {FEWEST_CONCEPTS} of the {len(concepts())} concepts"
            raise ValueError(f"artists of {split}: expected {expected}, got {drawn}; name other artists")


def sets_used(options: Options) -> list[str]:
    """Names of all sets of drawings that appear, each once."""
    return list(dict.fromkeys(name for split in SPLITS for hand in options.hands(split) for name in hand))


def attribution(options: Options) -> str:
    """A line for each set of drawings."""
    return "\n".join(drawing_set(name).attribution for name in sets_used(options))


def _shards(folder: Path, split: Split, options: Options) -> list[Shard]:
    total = options.count(split)
    size = options.test_size if split in ("test", "seen") else options.size
    return [
        Shard(
            path=folder / f"{split}-{number:06d}.tar",
            split=split,
            start=start,
            stop=min(start + SHARD_SAMPLES, total),
            size=size,
            seed=options.seed,
            hands=options.hands(split),
        )
        for number, start in enumerate(range(0, total, SHARD_SAMPLES))
    ]


def _is_current(out: Path, stamp: dict[str, int]) -> bool:
    """Whether ``out`` was written with this stamp. Raises FileExistsError if it holds anything else."""
    present = {path.name for path in out.iterdir()} if out.exists() else set()
    old = json.loads((out / "scenes.json").read_text(encoding="utf-8")) if "scenes.json" in present else {"files": []}
    foreign = present - {"scenes.json", *old["files"]}
    if foreign:
        raise FileExistsError(f"{out} holds files that are not scenes, such as {min(foreign)!r}: choose another --out")
    files = set(old.pop("files"))
    return old == stamp and files <= present


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0 on success, 1 after an error, which is printed as one line."""
    parser = argparse.ArgumentParser(prog="python -m softmask.data.scenes", description="Write captioned scenes.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    for name, value in asdict(Options()).items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, int):
            parser.add_argument(option, type=int, default=value, help=f"default {value}")
        else:
            default = ",".join(value) or {"val_artists": "emojione", "test_artists": "twemoji"}[name] + " beside others"
            parser.add_argument(option, type=_names, default=value, help=f"names, comma-separated (default {default})")
    parser.add_argument("--processes", type=positive, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parsed = vars(parser.parse_args(arguments))
    out, processes, begin = parsed.pop("out").absolute(), parsed.pop("processes"), time.perf_counter()
    try:
        options = Options(**parsed)
        written = write_scenes(out, options, processes=processes)
    except (FileExistsError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"wrote {out} in {time.perf_counter() - begin:.0f} s" if written else f"{out} is up to date")
    print(attribution(options))
    return 0
