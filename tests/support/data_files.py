"""Small images, tar shards and tokenizer folders for the tests of softmask.data."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CAPTION = "a red apple above two cherries"


def make_image(seed: int, *, size: tuple[int, int] = (40, 32), form: str = "PNG", mode: str = "RGB") -> bytes:
    """An encoded image of random pixels; `size` is (width, height)."""
    channels = {"RGB": 3, "RGBA": 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, mode).save(file, form)
    return file.getvalue()


def write_tar(
    path: Path, members: list[tuple[str, bytes]], *, form: int = tarfile.PAX_FORMAT, mtime: float = 0
) -> Path:
    """A tar of `members`; a fractional `mtime` gives every member a pax header, as webdataset's writer does."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), mtime
            tar.addfile(info, io.BytesIO(content))
    return path


def read_samples(folder: Path, split: str) -> list[dict[str, bytes]]:
    """The members of every sample of a split, by extension."""
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                key, _, extension = member.name.partition(".")
                samples.setdefault(key, {})[extension] = archive.extractfile(member).read()
    return list(samples.values())


def sample(number: int, caption: str | bytes = CAPTION, **options) -> list[tuple[str, bytes]]:
    """Members of a sample, named as by img2dataset."""
    text = caption if isinstance(caption, bytes) else caption.encode()
    meta = json.dumps({"caption": "from the json", "number": number}).encode()
    return [
        (f"{number:06d}.png", make_image(number, **options)),
        (f"{number:06d}.txt", text),
        (f"{number:06d}.json", meta),
    ]


def write_shards(folder: Path, count: int, per_shard: int) -> str:
    """Write `count` shards of `per_shard` good samples and return their brace pattern."""
    for shard in range(count):
        numbers = range(shard * per_shard, (shard + 1) * per_shard)
        members = [member for n in numbers for member in sample(n, f"{CAPTION} number {n}")]
        write_tar(folder / f"train-{shard:06d}.tar", members)
    return str(folder / f"train-{{000000..{count - 1:06d}}}.tar")
