"""Captioned scenes of OpenMoji drawings as WebDataset shards: training data that needs no network.

    python -m softmask.data.scenes --out DIR [--train 40000 --val 512 --test 512 --size 64 --test-size 256 --seed 0]

writes ``DIR/{train,val,test}-%06d.tar`` (members KEY.png, KEY.txt, KEY.json), ``DIR/ATTRIBUTION.txt``,
``DIR/concepts.json`` and the stamp ``DIR/scenes.json``. A scene depends only on (seed, split, index), not on its size
in pixels or the number of processes. A tenth of the concept pairs, chosen by a hash of their names, occurs only in
test, in about half of its scenes.

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
from softmask.data.scenes.captions import name_one
from softmask.data.scenes.draw import SPLITS, Split, encode_sample, sample_scene
from softmask.data.scenes.openmoji import ATTRIBUTION, concepts

VERSION = 5
"""Incremented when the same options give different files, so that old folders are rewritten."""

SHARD_SAMPLES = 5000


@dataclass(frozen=True)
class Options:
    """Everything the files depend on: scenes per split, sides in pixels (``size`` is that of train and val), seed.

    Raises:
        ValueError: a count is negative, or a side is less than 16.
    """

    train: int = 40000
    val: int = 512
    test: int = 512
    size: int = 64
    test_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("train", 0), ("val", 0), ("test", 0), ("size", 16), ("test_size", 16)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Shard:
    """One shard to write: scenes [start, stop) of a split."""

    path: Path
    split: Split
    start: int
    stop: int
    size: int
    seed: int

    @property
    def cost(self) -> int:
        return (self.stop - self.start) * self.size


def _write_shard(shard: Shard) -> None:
    with shard.path.open("wb") as stream:
        # Fixed owner and time: the same scenes give the same bytes.
        writer = webdataset.TarWriter(stream, user="softmask", group="softmask", mtime=0, encoder=False)
        for index in range(shard.start, shard.stop):
            sample = encode_sample(sample_scene(shard.split, index, seed=shard.seed), shard.split, shard.size)
            writer.write({"__key__": f"{index:08d}", **sample})
        writer.close()


def write_scenes(out: Path, options: Options, *, processes: int) -> bool:
    """Write the folder ``out`` (see the module's docstring). Returns False if it already holds these scenes.

    Everything is written beside ``out`` and renamed at the end, so that a folder with a stamp is complete.

    Raises:
        FileExistsError: ``out`` holds files that this function did not write.
    """
    stamp = {"version": VERSION, **asdict(options)}
    if _is_current(out, stamp):
        return False
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards = [shard for split in SPLITS for shard in _shards(partial, split, options)]
    with multiprocessing.Pool(max(1, min(processes, len(shards)))) as pool:
        # Largest first, so that no process is left with a long job while the others idle.
        for _ in pool.imap_unordered(_write_shard, sorted(shards, key=lambda shard: -shard.cost)):
            pass
    known = [asdict(concept) | {"phrase": name_one(concept)} for concept in concepts()]
    (partial / "concepts.json").write_text(json.dumps(known, ensure_ascii=False, indent=1), encoding="utf-8")
    (partial / "ATTRIBUTION.txt").write_text(ATTRIBUTION + "\n", encoding="utf-8")
    files = sorted(path.name for path in partial.iterdir())
    (partial / "scenes.json").write_text(json.dumps({**stamp, "files": files}, indent=1), encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    return True


def _shards(folder: Path, split: Split, options: Options) -> list[Shard]:
    total: int = getattr(options, split)
    size = options.test_size if split == "test" else options.size
    return [
        Shard(folder / f"{split}-{number:06d}.tar", split, start, min(start + SHARD_SAMPLES, total), size, options.seed)
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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0 on success, 1 after an error, which is printed as one line."""
    parser = argparse.ArgumentParser(prog="python -m softmask.data.scenes", description="Write captioned scenes.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    for name, value in asdict(Options()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--processes", type=positive, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parsed = vars(parser.parse_args(arguments))
    out, processes, begin = parsed.pop("out").absolute(), parsed.pop("processes"), time.perf_counter()
    try:
        written = write_scenes(out, Options(**parsed), processes=processes)
    except (FileExistsError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"wrote {out} in {time.perf_counter() - begin:.0f} s" if written else f"{out} is up to date")
    print(ATTRIBUTION)
    return 0
