"""The folder of a generator of scenes: shards written by several processes, texts beside them, and a stamp.

The stamp, ``scenes.json``, holds everything that the files depend on and their names. It tells whether the folder is up
to date, and which files may be replaced.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import webdataset

from softmask.arguments import positive

SHARD_SAMPLES = 5000
STAMP = "scenes.json"


@dataclass(frozen=True)
class Scenes:
    """The scenes of one split: ``make(index)`` returns the members of a sample. ``size`` is an image's side."""

    split: str
    count: int
    size: int
    make: Callable[[int], dict[str, bytes]]


@dataclass(frozen=True)
class _Shard:
    """One shard to write: scenes [start, stop) of a split."""

    path: Path
    scenes: Scenes
    start: int
    stop: int

    @property
    def cost(self) -> int:
        return (self.stop - self.start) * self.scenes.size


def is_current(out: Path, stamp: Mapping[str, Any], *, name: str = STAMP) -> bool:
    """Whether ``out`` was written with this stamp, in the file ``name``. Raises FileExistsError if it holds anything
    else."""
    present = {path.name for path in out.iterdir()} if out.exists() else set()
    old = json.loads((out / name).read_text(encoding="utf-8")) if name in present else {"files": []}
    foreign = present - {name, *old["files"]}
    if foreign:
        raise FileExistsError(f"{out} holds files that are not scenes, such as {min(foreign)!r}: choose another --out")
    files = set(old.pop("files"))
    return old == stamp and files <= present


def write_folder(
    out: Path, stamp: Mapping[str, Any], splits: Sequence[Scenes], texts: Mapping[str, str], *, processes: int
) -> None:
    """Write shards, texts (name -> content) and the stamp. `is_current` has to be asked before."""
    with whole_folder(out, stamp) as partial:
        shards = [shard for scenes in splits for shard in _shards(partial, scenes)]
        with multiprocessing.Pool(max(1, min(processes, len(shards)))) as pool:
            # Largest first, so that no process is left with a long job while the others idle.
            for _ in pool.imap_unordered(_write_shard, sorted(shards, key=lambda shard: -shard.cost)):
                pass
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(out: Path, stamp: Mapping[str, Any], *, name: str = STAMP) -> Iterator[Path]:
    """A folder beside ``out`` to write into. At the end it gets the stamp, in the file ``name``, and takes the place of
    ``out``, so that a folder with a stamp is complete."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    files = sorted(path.name for path in partial.iterdir())
    (partial / name).write_text(json.dumps({**stamp, "files": files}, indent=1), encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)


def _shards(folder: Path, scenes: Scenes) -> list[_Shard]:
    return [
        _Shard(folder / f"{scenes.split}-{number:06d}.tar", scenes, start, min(start + SHARD_SAMPLES, scenes.count))
        for number, start in enumerate(range(0, scenes.count, SHARD_SAMPLES))
    ]


def _write_shard(shard: _Shard) -> None:
    with shard.path.open("wb") as stream:
        # Fixed owner and time: the same scenes give the same bytes.
        writer = webdataset.TarWriter(stream, user="softmask", group="softmask", mtime=0, encoder=False)
        for index in range(shard.start, shard.stop):
            writer.write({"__key__": f"{index:08d}", **shard.scenes.make(index)})
        writer.close()


def check_sizes(options: Any) -> None:
    """ValueError if a count of scenes (train, val, test) is negative or a side (size, test_size) less than 16."""
    for name, least in (("train", 0), ("val", 0), ("test", 0), ("size", 16), ("test_size", 16)):
        if getattr(options, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(options, name)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--out and --processes."""
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--processes", type=positive, default=len(os.sched_getaffinity(0)), help="default: all cores")


def run(out: Path, write: Callable[[], bool], attribution: Callable[[], str]) -> int:
    """Write, then say what was done and by whom the pictures are. Returns 1 after an error, printed as one line."""
    begin = time.perf_counter()
    try:
        written = write()
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"wrote {out} in {time.perf_counter() - begin:.0f} s" if written else f"{out} is up to date")
    print(attribution())
    return 0
