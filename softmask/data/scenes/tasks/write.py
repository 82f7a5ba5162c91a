"""Train, validation and test files of downstream tasks in their data sets' formats, about generated scenes.

    python -m softmask.data.scenes --tasks --out DIR [--train 10000 --val 1000 --test 2000 --size 64 --test-size 256]

writes ``DIR/images/COCO_{train2014,val2014,test2015}_%012d.jpg`` and about them the files of vqa.py, nlvr2.py,
snli_ve.py, captions.py and grounding.py; ``DIR/classification`` (classification.py); ``DIR/answer_list.json``, the true
answers of VQA's questions; ``DIR/ATTRIBUTION.txt``, ``DIR/concepts.json`` and the stamp ``DIR/tasks.json``. A scene
depends only on (seed, split, number) and its artists. ``--artists`` and others are as for scenes.

Concepts chosen by a hash of their names, 8 percent, occur in test alone, as do a tenth of the pairs. About a quarter of
test's entries involve them: these have ``"unseen": true``. Pre-training's scenes do show the concepts.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from softmask.data import rle
from softmask.data.scenes.artists import drawing_set
from softmask.data.scenes.concepts import concepts
from softmask.data.scenes.draw import render
from softmask.data.scenes.folder import is_current, run, whole_folder
from softmask.data.scenes.layout import Split, drawn_concepts
from softmask.data.scenes.tasks.captions import captions_file
from softmask.data.scenes.tasks.classification import CLASSES, class_texts, classes, pictures_per_class, write_class
from softmask.data.scenes.tasks.families import MEMBERS
from softmask.data.scenes.tasks.grounding import Masked, grounding_files
from softmask.data.scenes.tasks.nlvr2 import nlvr2_files
from softmask.data.scenes.tasks.scenes import FIRST_ID, IMAGES, sample
from softmask.data.scenes.tasks.snli_ve import snli_ve_files
from softmask.data.scenes.tasks.unseen import is_unseen
from softmask.data.scenes.tasks.vqa import vqa_files
from softmask.data.scenes.write import Options, attribution, options_parser, sets_used, texts_beside

VERSION = 2
"""Incremented when the same options give different files, so that old folders are rewritten."""

DEFAULTS = Options(train=10000, val=1000, test=2000)
SPLITS: tuple[Split, ...] = ("train", "val", "test")
FEWEST_CONCEPTS = 100
_CHUNK = 100  # scenes that a process draws at a time
_LEFT_OUT = ("singles", "varied")  # options that are for pre-training alone
_STAMP = "tasks.json"

Job = Callable[[], list[Masked]]
"""Writes pictures and returns those that tasks' files are about."""


def write_tasks(out: Path, options: Options, *, processes: int) -> bool:
    """Write the folder ``out`` (see the module's docstring). Returns False if it already holds these files.

    Raises:
        FileExistsError: ``out`` holds files that this function did not write.
        ValueError: scenes that make no whole families, or artists who have drawn too few concepts.
    """
    stamp = json.loads(json.dumps({"version": VERSION, **asdict(options)}))
    if is_current(out, stamp, name=_STAMP):
        return False
    for name in sets_used(options):
        drawing_set(name)  # fetched here, not in several processes at once
    _check(options)
    with whole_folder(out, stamp, name=_STAMP) as partial_out:
        for folder in (IMAGES, CLASSES):
            (partial_out / folder).mkdir()
        with multiprocessing.Pool(processes) as pool:
            drawn = pool.map(_run, _jobs(partial_out, options), chunksize=1)
        pictures = [picture for chunk in drawn for picture in chunk]
        for name, content in _files(pictures, options.seed):
            (partial_out / name).write_text(json.dumps(content), encoding="utf-8")
        for name, text in (texts_beside(options) | class_texts(_classes(options))).items():
            (partial_out / name).write_text(text, encoding="utf-8")
    return True


def _check(options: Options) -> None:
    for split in SPLITS:
        count, drawn = options.count(split), drawn_concepts(options.hands(split))
        if count % MEMBERS or count > FIRST_ID["val"]:
            raise ValueError(f"{split}: expected a multiple of {MEMBERS} up to {FIRST_ID['val']}, got {count}")
        if count and (len(drawn) < FEWEST_CONCEPTS or not any(is_unseen(concepts()[number]) for number in drawn)):
            expected = f"drawings of at least {FEWEST_CONCEPTS} concepts, and of an unseen one"
            raise ValueError(f"artists of {split}: expected {expected}, got {len(drawn)}; name other artists")


def _classes(options: Options) -> list[int]:
    return classes([options.hands(split) for split in SPLITS])


def _jobs(out: Path, options: Options) -> list[Job]:
    """What a process does at a time; the largest pictures first, so that none is left with a long job."""
    jobs: list[Job] = []
    for split in reversed(SPLITS):
        count, size, hands = options.count(split), _size(split, options), options.hands(split)
        chunks = (range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK))
        jobs += [partial(_draw, out, split, chunk, options) for chunk in chunks]
        for folder, each in pictures_per_class(split, count).items():
            jobs += [
                partial(write_class, out / CLASSES / folder, one, each, size, options.seed, hands)
                for one in _classes(options)
            ]
    return jobs


def _run(job: Job) -> list[Masked]:
    return job()


def _size(split: Split, options: Options) -> int:
    return options.test_size if split == "test" else options.size


def _draw(out: Path, split: Split, numbers: range, options: Options) -> list[Masked]:
    """Write pictures of scenes."""
    drawn = []
    for number in numbers:
        scene, shown = sample(split, number, seed=options.seed, hands=options.hands(split))
        # Each drawing by itself, in the order of the groups.
        apart = replace(scene, groups=tuple((k,) for group in scene.groups for k in group))
        image, masks = render(apart, _size(split, options))
        # The slow exact transform and whole chroma: libjpeg's bytes are the same with every instruction set.
        image.save(out / shown.path, "JPEG", quality=95, subsampling=0)
        drawn.append(Masked(shown, tuple(map(rle.encode, masks)) if split != "train" else ()))
    return drawn


def _files(pictures: Sequence[Masked], seed: int) -> Iterator[tuple[str, Any]]:
    """Names and contents of the files about the pictures."""
    shown = {split: [one.shown for one in pictures if one.shown.split == split] for split in SPLITS}
    answers: set[str] = set()
    for split in SPLITS:
        vqa = vqa_files(split, shown[split], seed)
        answers.update(one["multiple_choice_answer"] for one in vqa[f"vqa_{split}_annotations.json"]["annotations"])
        yield from vqa.items()
        yield from nlvr2_files(split, shown[split], seed).items()
        yield from snli_ve_files(split, shown[split], seed).items()
    yield "answer_list.json", sorted(answers)
    yield from captions_file([one for split in SPLITS for one in shown[split]], seed).items()
    masked = [one for split in ("val", "test") for one in pictures if one.shown.split == split]
    yield from grounding_files(masked, seed).items()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0 on success, 1 after an error, which is printed as one line."""
    parser = options_parser(
        "python -m softmask.data.scenes --tasks", "Write files of downstream tasks.", DEFAULTS, left_out=_LEFT_OUT
    )
    parsed = vars(parser.parse_args(arguments))
    out, processes = parsed.pop("out").absolute(), parsed.pop("processes")
    return run(
        out,
        lambda: write_tasks(out, Options(**parsed), processes=processes),
        lambda: attribution(Options(**parsed)),
    )
