"""Scenes of photographic cut-outs: which stamps are used, what captions say, and which stamps occur in test alone."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from softmask.data import rle
from softmask.data.photos import packages, scene, stamps, write
from softmask.data.photos.backgrounds import LEAST_AREA, paint, sample_crop
from softmask.data.scenes import folder as folders
from softmask.data.scenes.captions import name_one
from tests.support.data_files import read_samples

THINGS = (
    "apple", "ball", "cat", "dog", "egg", "fan", "goat", "hat", "iron", "jar", "kite", "lamp", "mug", "nut", "owl",
    "pan", "quilt", "rose", "saw", "tent", "urn", "van", "wagon", "yak", "zebra", "ant", "bear", "cup", "duck", "eel",
)  # fmt: skip
STAMPS, BACKGROUNDS = packages.STAMPS.folder, packages.SCRATCH.folder
SMALL = ["--train", "7", "--val", "3", "--test", "6", "--size", "32", "--test-size", "48"]


def put_stamp(root: Path, name: str, line: str | None, *, size: int = 60, alpha: int = 255, margin: int = 4) -> None:
    image = Image.new("RGBA", (size + 2 * margin, size + 2 * margin))
    colour = (len(name) * 7 % 256, sum(name.encode()) % 256, 90, alpha)
    ImageDraw.Draw(image).ellipse((margin, margin, margin + size - 1, margin + size - 1), fill=colour)
    path = root / STAMPS / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    if line is not None:
        path.with_suffix(".txt").write_text(f"{line}\nde.utf8=Etwas anderes.\n", encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """Thirty stamps and a second apple; two photographs, one of them with a place."""
    for thing in THINGS:
        put_stamp(tmp_path, f"things/{thing}", f"{'An' if thing[0] in 'aeiou' else 'A'} {thing}.")
    put_stamp(tmp_path, "things/apple-2", "An apple.")
    for name, colour in (("lake", "blue"), ("flowers", "red")):
        path = tmp_path / BACKGROUNDS / "Nature" / f"{name}.{'jpg' if name == 'lake' else 'gif'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (120, 90), colour).save(path)
    scene.read_pictures.cache_clear()
    yield tmp_path
    scene.read_pictures.cache_clear()


def generate(root: Path, out: str, *options: str) -> int:
    scene.read_pictures.cache_clear()
    return write.main(["--out", str(root / out), "--root", str(root), "--processes", "1", *SMALL, *options])


def records(folder: Path, split: str) -> list[tuple[dict, Image.Image]]:
    samples = read_samples(folder, split)
    assert all(json.loads(one["json"])["caption"] == one["txt"].decode() for one in samples)
    return [(json.loads(one["json"]), Image.open(io.BytesIO(one["png"]))) for one in samples]


@pytest.mark.parametrize(
    ("name", "line", "phrase"),
    [
        ("x", "A green apple.", "a green apple"),
        ("x", "An albino peahen (a female peafowl, or peacock).", "an albino peahen"),
        ("x", "A Seville orange, also called a bitter orange.", "a Seville orange"),
        ("x", "A UK post box. Put your letter in here!", "a UK post box"),
        ("x", "A “Fuji” apple.", "a Fuji apple"),
        ("x", "A plumber’s wrench.", "a plumber's wrench"),
        ("x", "Some flowers.", "some flowers"),
        ("x", "The Earth. Our planet!", "the Earth"),
        ("x", "Remember to flush the toilet!", None),
        ("x", "", None),
        ("household/toilet", "Remember to flush the toilet!", "a toilet"),
        ("space/planets/4_mars", "Mars—the red planet.", "Mars"),
    ],
)
def test_phrase_is_the_first_line_up_to_a_comma_or_the_end_of_the_sentence(name, line, phrase):
    concept = stamps.concept_of(name, line)
    assert (concept and name_one(concept)) == phrase


def test_drawn_small_transparent_and_uncut_stamps_are_left_out(root):
    put_stamp(root, "animals/birds/cartoon/tit", "A tit.")
    put_stamp(root, "symbols/alphabets/a", "A letter.")
    put_stamp(root, "things/mirror_mirror", "A mirror.")
    put_stamp(root, "things/silent", None)
    put_stamp(root, "things/tiny", "A tiny thing.", size=30)
    put_stamp(root, "things/glass", "A glass.", alpha=60)
    Image.new("RGB", (60, 60), "red").save(root / STAMPS / "things" / "square.png")
    (root / STAMPS / "things" / "square.txt").write_text("A square.")
    used = {stamp.name for stamp in stamps.read_stamps((root,))}
    assert used == {f"things/{thing}" for thing in (*THINGS, "apple-2")}


def test_large_stamps_are_cropped_and_reduced(root):
    put_stamp(root, "things/big", "A big one.", size=700, margin=50)
    (big,) = [stamp for stamp in stamps.read_stamps((root,)) if stamp.name == "things/big"]
    assert [level.size for level in big.picture.colors] == [(256, 256), (128, 128), (64, 64)]


def test_unseen_stamps_occur_in_half_of_test_and_nowhere_else(root):
    pictures = scene.read_pictures((root,))
    assert any(stamp.unseen for stamp in pictures.stamps)

    def share(split: str) -> float:
        scenes = [scene.sample_scene(pictures, split, i) for i in range(150)]
        return float(np.mean([any(pictures.stamps[n].unseen for n in one.stamps) for one in scenes]))

    assert share("train") == share("val") == 0
    assert abs(share("test") - 0.5) < 4 * 0.5 / 150**0.5


def test_about_15_percent_of_names_are_unseen(root):
    one = stamps.read_stamps((root,))[0]
    share = np.mean([stamps.Stamp(f"name-{i}", one.concept, one.picture, "").unseen for i in range(4000)])
    assert abs(share - stamps.UNSEEN_SHARE) < 4 * (0.15 * 0.85 / 4000) ** 0.5


def test_captions_name_every_stamp_once_and_only_places_that_are_shown(root):
    """Also: two apples never meet, and nothing is called a drawing."""
    pictures = scene.read_pictures((root,))
    places, counts = set(), set()
    for i in range(200):
        one = scene.sample_scene(pictures, "test", i)
        names = [pictures.stamps[n].concept.name for n in one.stamps]
        assert len(set(names)) == len(names)
        counts.add(len(names))
        text = one.caption.text
        for k, name in enumerate(names):
            start, end = one.caption.spans[k]
            assert text[start:end] == name and text[:start].endswith(f"{'an' if name[0] in 'aeiou' else 'a'} ")
        assert "drawing" not in text
        by_lake = pictures.photographs[one.crop.photograph].name == "Nature/lake.jpg"
        assert "lake" not in text or ("by a lake" in text and by_lake)
        places.add("by a lake" in text)
    assert counts == {1, 2, 3} and places == {True, False}


def test_relations_in_captions_are_true(root):
    """A stamp that is said to be above another has its mask's center above."""
    pictures, checked = scene.read_pictures((root,)), 0
    for i in range(120):
        one = scene.sample_scene(pictures, "train", i)
        words = one.caption.text.split()
        if len(one.stamps) == 2 and {"above", "over", "below", "under"} & set(words):
            upper, lower = sorted((0, 1), key=lambda k: one.poses[k].y)
            first = min((0, 1), key=lambda k: one.caption.spans[k][0])
            assert first == (upper if {"above", "over"} & set(words) else lower), one.caption.text
            checked += 1
    assert checked > 5


def test_crops_are_squares_of_at_least_40_percent(root):
    pictures = scene.read_pictures((root,))
    for i in range(100):
        crop = scene.sample_scene(pictures, "val", i).crop
        width, height = pictures.photographs[crop.photograph].image.size
        assert crop.side**2 >= 0.999 * LEAST_AREA * width * height and crop.left >= 0 and crop.top >= 0
        assert crop.left + crop.side <= width + 1e-6 and crop.top + crop.side <= height + 1e-6
    crop = sample_crop(pictures.photographs, Random(0))
    assert paint(pictures.photographs, crop, 40).size == (40, 40)


def test_images_of_two_sizes_show_the_same_scene(root):
    pictures = scene.read_pictures((root,))
    for i in range(10):
        one = scene.sample_scene(pictures, "test", i)
        small, large = (json.loads(scene.encode_scene(pictures, one, "test", size)["json"]) for size in (32, 128))
        assert small["caption"] == large["caption"]
        for a, b in zip(small["objects"], large["objects"], strict=True):
            shares = [rle.decode(entry["mask"]).mean() for entry in (a, b)]
            assert abs(shares[0] - shares[1]) < 0.02


def test_folder_is_complete_and_records_mark_unseen_stamps(root, capsys):
    assert generate(root, "set") == 0
    printed, out = capsys.readouterr().out, root / "set"
    attributed = (out / "ATTRIBUTION.txt").read_text(encoding="utf-8")
    assert attributed in printed and "GPL-2" in attributed and "CC BY-SA 3.0" in attributed and "MATE" not in attributed
    listed = {entry["name"]: entry for entry in json.loads((out / "concepts.json").read_text(encoding="utf-8"))}
    assert set(listed) == set(THINGS) and listed["owl"]["phrase"] == "an owl" and len(listed["apple"]["stamps"]) == 2
    for split, count, side in (("train", 7, 32), ("val", 3, 32), ("test", 6, 48)):
        found = records(out, split)
        assert len(found) == count
        for record, image in found:
            assert image.mode == "RGB" and image.size == (side, side) and record["split"] == split
            for entry in record["objects"]:
                start, end = entry["span"]
                assert record["caption"][start:end] == entry["phrase"] == entry["concept"] and entry["count"] == 1
                assert rle.decode(entry["mask"]).any() and rle.decode(entry["mask"]).shape == (side, side)
                assert entry["unseen"] in {stamp["unseen"] for stamp in listed[entry["concept"]]["stamps"]}
                assert split == "test" or not entry["unseen"]


def test_bytes_do_not_depend_on_the_number_of_processes(root, monkeypatch):
    monkeypatch.setattr(folders, "SHARD_SAMPLES", 4)
    assert generate(root, "one") == generate(root, "two", "--processes", "2") == 0
    names = sorted(path.name for path in (root / "one").iterdir())
    assert names == sorted(path.name for path in (root / "two").iterdir()) and "train-000001.tar" in names
    for name in names:
        assert (root / "one" / name).read_bytes() == (root / "two" / name).read_bytes(), name


def test_folder_is_rewritten_when_options_or_pictures_change(root, capsys):
    assert generate(root, "set") == 0
    assert generate(root, "set") == 0 and "is up to date" in capsys.readouterr().out
    assert generate(root, "set", "--seed", "1") == 0 and "wrote" in capsys.readouterr().out
    put_stamp(root, "things/owl", "An owl.", size=50)
    assert generate(root, "set", "--seed", "1") == 0 and "wrote" in capsys.readouterr().out


def test_packages_may_lie_in_several_roots(root, tmp_path):
    moved = tmp_path / "other"
    (moved / BACKGROUNDS).parent.mkdir(parents=True)
    (root / BACKGROUNDS).rename(moved / BACKGROUNDS)
    assert write.main(["--out", str(tmp_path / "set"), "--root", f"{root},{moved}", "--processes", "1", *SMALL]) == 0


@pytest.mark.parametrize(
    ("lacking", "package"), [(STAMPS, "tuxpaint-stamps-default"), (BACKGROUNDS, "scratch")], ids=["stamps", "photos"]
)
def test_missing_package_is_one_line_with_the_folder_and_the_command(root, capsys, lacking, package):
    (root / lacking).rename(root / "away")
    assert generate(root, "set") == 1 and not (root / "set").exists()
    (line,) = capsys.readouterr().err.splitlines()
    command = f"`apt-get download {package} && dpkg -x {package}_*.deb DIR`, then --root DIR"
    assert line == f"{root / lacking}: no such folder; run {command}"


def test_other_errors_are_one_line(root, capsys):
    (root / "mine").mkdir()
    (root / "mine" / "mine.txt").write_text("mine")
    (root / "file").write_text("not a folder")
    cases = [
        ("mine", (), "holds files that are not scenes, such as 'mine.txt'"),
        ("set", ("--test-size", "0"), "test_size must be at least 16, got 0"),
        ("file/set", (), "Not a directory"),
    ]
    for out, options, message in cases:
        assert generate(root, out, *options) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert [path.name for path in (root / "mine").iterdir()] == ["mine.txt"]
    (root / STAMPS / "things" / "owl.png").write_bytes(b"broken")
    assert generate(root, "set") == 1 and len(capsys.readouterr().err.splitlines()) == 1


def test_too_few_stamps_are_refused(root, capsys):
    for thing in THINGS[8:]:
        (root / STAMPS / "things" / f"{thing}.png").unlink()
    assert generate(root, "set") == 1
    assert "expected stamps of at least 10 things for training" in capsys.readouterr().err


def test_scenes_do_not_import_photos():
    package = Path(folders.__file__).parent
    assert not [path.name for path in package.glob("*.py") if "data.photos" in path.read_text(encoding="utf-8")]
