"""The folder of the scenes' tasks: complete, always of the same bytes, and read by the formats' readers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from softmask.data import rle
from softmask.data.formats.classification import open_classification, read_templates
from softmask.data.formats.karpathy import karpathy_entries
from softmask.data.formats.nlvr2 import open_nlvr2
from softmask.data.formats.refcoco import open_refcoco
from softmask.data.formats.snli_ve import open_snli_ve
from softmask.data.formats.vqa import open_vqa, read_answer_list
from softmask.data.records import LeftOut
from softmask.data.scenes.concepts import concepts
from softmask.data.scenes.tasks import write
from softmask.data.scenes.tasks.classification import pictures_per_class
from softmask.data.scenes.tasks.unseen import UNSEEN_COLORS, unseen_colors
from softmask.data.scenes.write import Options
from tests.data.scenes import truth

SMALL = Options(train=40, val=24, test=24, size=32, test_size=64)
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tasks") / "set"
    assert write.write_tasks(out, SMALL, processes=1)
    return out


def load(folder: Path, name: str):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_bytes_do_not_depend_on_the_number_of_processes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_CHUNK", 16)
    write.write_tasks(tmp_path / "two", SMALL, processes=2)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) > 88 + 4 * len(concepts())
    assert files == sorted(path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*.*"))
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_jpeg_has_the_same_bytes_without_vector_instructions(tmp_path):
    code = (
        "import sys; from PIL import Image; "
        "image = Image.frombytes('RGB', (64, 64), bytes(i * i * 7 % 251 for i in range(64 * 64 * 3))); "
        "image.save(sys.argv[1], 'JPEG', quality=95, subsampling=0)"
    )
    for name, variables in (("a.jpg", {}), ("b.jpg", {"JSIMD_FORCENONE": "1"})):
        subprocess.run([sys.executable, "-c", code, tmp_path / name], env={**os.environ, **variables}, check=True)
    assert (tmp_path / "a.jpg").read_bytes() == (tmp_path / "b.jpg").read_bytes()


def test_up_to_date_files_are_kept_and_others_replaced(tmp_path):
    out, options = tmp_path / "set", Options(train=4, val=0, test=0, size=32)
    assert write.write_tasks(out, options, processes=1)
    assert not write.write_tasks(out, options, processes=2)
    (out / "captions.json").unlink()
    assert write.write_tasks(out, options, processes=1)
    (out / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="mine.txt"):
        write.write_tasks(out, options, processes=1)


def test_command_line(tmp_path, capsys):
    command = [sys.executable, "-m", "softmask.data.scenes", "--tasks", "--out", str(tmp_path / "a")]
    done = subprocess.run([*command, "--train", "10"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "train: expected a multiple of 4 up to 1000000, got 10\n"
    nothing = ["--train", "0", "--val", "0", "--test", "0"]
    assert write.main(["--out", str(tmp_path / "a"), *nothing]) == 0 and "OpenMoji" in capsys.readouterr().out
    assert write.main(["--out", str(tmp_path / "a"), *nothing]) == 0 and "up to date" in capsys.readouterr().out


def test_pictures_are_complete(folder):
    for split, name in (("train", "train2014"), ("val", "val2014"), ("test", "test2015")):
        found = sorted((folder / "images").glob(f"COCO_{name}_*.jpg"))
        assert len(found) == SMALL.count(split)
        for path in found:
            with Image.open(path) as image:
                assert image.format == "JPEG" and image.size == ((64, 64) if split == "test" else (32, 32))
    names = [concept["name"] for concept in load(folder, "concepts.json")]
    assert names == [concept.name for concept in concepts()]
    assert "CC BY-SA 4.0" in (folder / "ATTRIBUTION.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("split", SPLITS)
def test_readers_read_the_files(folder, split):
    vqa = [str(folder / f"vqa_{split}_{kind}.json") for kind in ("questions", "annotations")]
    sources = [open_vqa(vqa), open_nlvr2([str(folder / f"nlvr2_{split}.json")])]
    sources += [open_snli_ve([str(folder / f"snli_ve_{split}.json")])]
    if split != "train":
        paths = [str(folder / f"grounding_{kind}.json") for kind in ("instances", "refs")]
        sources += [open_refcoco(paths, split=split)]
    for source in sources:
        assert source.problems == [] and len(source) > SMALL.count(split)
        assert all(source.read(index) for index in range(len(source)))
    answers = {source.example(0).target["answers"][0] for source in sources[:1]}
    assert answers and set(read_answer_list(str(folder / "answer_list.json"))) >= {"yes", "no", "0", "4"}
    left_out = LeftOut()
    tree = load(folder, "captions.json")
    images = list(karpathy_entries("captions.json", tree, folder=str(folder), split=split, left_out=left_out))
    assert len(images) == SMALL.count(split) and not left_out
    assert all((folder / path).is_file() and len(captions) == 5 for path, captions in images)


def test_classes_are_complete(folder):
    names = sorted(concept.name.replace(" ", "_") for concept in concepts())
    listed = (folder / "classification" / "classnames.txt").read_text(encoding="utf-8").splitlines()
    assert listed == [name.replace("_", " ") for name in names]
    assert read_templates(str(folder / "classification" / "zeroshot_classification_templates.txt"))
    for part in ("train", "val", "test", "test_unseen"):
        source = open_classification([str(folder / "classification" / part)])
        assert source.classes == listed and source.problems == []
        assert {source.example(index).target for index in range(len(source))} == set(range(len(names)))
    assert pictures_per_class("train", 10000) == {"train": 20}
    assert pictures_per_class("val", 1000) == {"val": 2}
    assert pictures_per_class("test", 2000) == {"test": 3, "test_unseen": 1}
    assert all(len(unseen_colors(concept)) == UNSEEN_COLORS for concept in concepts())


def test_unseen_backgrounds_of_a_class_are_in_their_folder_alone(folder):
    """The colour at the picture's corners, which single drawings leave free more often than not, tells."""
    shades = {
        "white": (246, 246, 242), "gray": (178, 180, 184), "red": (218, 98, 92), "pink": (246, 184, 204),
        "orange": (244, 172, 98), "yellow": (248, 228, 128), "green": (138, 198, 128), "blue": (122, 172, 232),
        "purple": (176, 146, 216), "brown": (172, 132, 98),
    }  # fmt: skip
    hits = defaultdict(list)
    for concept in concepts()[::4]:
        for part in ("train", "test_unseen"):
            path = folder / "classification" / part / concept.name.replace(" ", "_") / "00000000.png"
            pixels = np.asarray(Image.open(path), dtype=float)
            corners = np.median([pixels[y, x] for y in (1, -2) for x in (1, -2)], axis=0)
            nearest = min(shades, key=lambda name: np.abs(corners - shades[name]).sum())
            hits[part].append(nearest in unseen_colors(concept))
    assert np.mean(hits["test_unseen"]) > 0.6 and np.mean(hits["train"]) < 0.2


def test_expressions_name_one_drawing(folder):
    instances, refs = load(folder, "grounding_instances.json"), load(folder, "grounding_refs.json")
    names = {one["id"]: one["name"] for one in instances["categories"]}
    by_image = defaultdict(lambda: defaultdict(list))
    annotations = {}
    for one in instances["annotations"]:
        mask = rle.decode(one["segmentation"])
        rows, columns = np.nonzero(mask)
        left, top, width, height = one["bbox"]
        assert (left, top) == (columns.min(), rows.min()) and one["area"] == mask.sum()
        assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
        annotations[one["id"]] = one
        by_image[one["image_id"]][names[one["category_id"]]].append(one["id"])
    sides = {one["id"]: one["width"] for one in instances["images"]}
    kinds = set()
    for ref in refs:
        drawn, side = by_image[ref["image_id"]], sides[ref["image_id"]]
        boxes = {name: [corners(annotations[k]["bbox"], side) for k in ids] for name, ids in drawn.items()}
        own = annotations[ref["ann_id"]]
        name = names[own["category_id"]]
        wanted = [(name, drawn[name].index(own["id"]))]
        for sentence in ref["sentences"]:
            assert truth.expression(sentence["sent"], truth.Picture(boxes, "")) == wanted, (sentence, boxes)
            kinds |= {kind for kind in ("the left of", "on the", "at the", "above") if kind in sentence["sent"]}
    assert len(kinds) > 1 and {ref["split"] for ref in refs} == {"val", "test"}
    assert all(sum(map(len, drawn.values())) > 1 for drawn in by_image.values())


def corners(bbox: list[int], side: int) -> tuple[float, float, float, float]:
    left, top, width, height = bbox
    return left / side, top / side, (left + width) / side, (top + height) / side
