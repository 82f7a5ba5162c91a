"""Generated scenes: captions are true, masks cover what is visible, and no split leaks."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from softmask.data import rle
from softmask.data.scenes import draw, layout, place, write
from softmask.data.scenes import folder as folders
from softmask.data.scenes.captions import MAX_WORDS, Box, Group, write_caption
from softmask.data.scenes.concepts import Concept, concepts
from softmask.data.scenes.drawings import OPAQUE
from softmask.data.scenes.layout import Scene
from tests.support.data_files import read_samples

BY_NAME = {concept.name: concept for concept in concepts()}
NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four"}
SMALL = write.Options(train=12, val=6, test=6, size=32, test_size=64)
ATTRIBUTION = write.attribution(SMALL)
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "SHARD_SAMPLES", 5)
        assert write.write_scenes(out, SMALL, processes=1)
    return out


@pytest.fixture(scope="module")
def sampled() -> dict[str, list[Scene]]:
    return {split: [layout.sample_scene(split, i) for i in range(400)] for split in SPLITS}


def names(scene: Scene) -> list[str]:
    return [concepts()[scene.placements[group[0]].concept].name for group in scene.groups]


def test_concepts_are_many_readable_and_unique():
    assert len(concepts()) >= 400
    assert len(BY_NAME) == len(concepts()) == len({concept.emoji for concept in concepts()})
    forbidden = r"\b(flag|skin tone|letter|digit|keycap|arrow button|o.clock|face|zodiac|symbol)\b"
    for concept in concepts():
        assert re.fullmatch(r"[a-z]+([ -][a-z]+)*", concept.name), concept
        assert not re.search(forbidden, concept.name), concept
        assert not any(0x1F1E6 <= ord(char) <= 0x1F1FF or 0x1F3FB <= ord(char) <= 0x1F3FF for char in concept.emoji)
        assert concept.form == "count" or concept.plural == concept.name


@pytest.mark.parametrize(
    ("name", "plural"), [("cup of coffee", "cups of coffee"), ("butterfly", "butterflies"), ("fox", "foxes")]
)
def test_plural(name, plural):
    assert BY_NAME[name].plural == plural


def test_bytes_do_not_depend_on_the_number_of_processes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "SHARD_SAMPLES", 5)
    write.write_scenes(tmp_path / "two", SMALL, processes=2)
    files = sorted(path.name for path in folder.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert sum(name.startswith("train-") for name in files) == 3
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_folder_is_complete_and_attributed(folder):
    assert (folder / "ATTRIBUTION.txt").read_text(encoding="utf-8").strip() == ATTRIBUTION
    assert "OpenMoji" in ATTRIBUTION and "CC BY-SA 4.0" in ATTRIBUTION
    listed = json.loads((folder / "concepts.json").read_text(encoding="utf-8"))
    assert [entry["name"] for entry in listed] == [concept.name for concept in concepts()]
    for split in SPLITS:
        samples = read_samples(folder, split)
        assert len(samples) == SMALL.count(split)
        for sample in samples:
            record = json.loads(sample["json"])
            image = Image.open(io.BytesIO(sample["png"]))
            side = SMALL.test_size if split == "test" else SMALL.size
            assert image.mode == "RGB" and image.size == (side, side)
            assert record["caption"] == sample["txt"].decode() and record["split"] == split
            for entry in record["objects"]:
                start, end = entry["span"]
                assert record["caption"][start:end] == entry["phrase"]
                concept = BY_NAME[entry["concept"]]
                assert entry["phrase"] == (concept.plural if entry["count"] > 1 else concept.name)
                assert rle.decode(entry["mask"]).shape == (side, side)
                assert rle.decode(entry["mask"]).any()


def test_up_to_date_scenes_are_kept_and_others_replaced(folder, tmp_path):
    out = tmp_path / "set"
    options = write.Options(train=3, val=1, test=1, size=32, test_size=32)
    (tmp_path / ".set.partial").mkdir()
    (tmp_path / ".set.partial" / "train-000007.tar").write_bytes(b"left by a killed run")
    assert write.write_scenes(out, options, processes=1)
    assert not (out / "train-000007.tar").exists()
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert not write.write_scenes(out, options, processes=2)
    assert times == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    before = (out / "train-000000.tar").read_bytes()
    assert write.write_scenes(out, replace(options, seed=1), processes=1)
    assert (out / "train-000000.tar").read_bytes() != before
    (out / "train-000000.tar").unlink()
    assert write.write_scenes(out, replace(options, seed=1), processes=1)


def test_unrelated_files_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert write.main(["--out", str(tmp_path), "--train", "1", "--val", "0", "--test", "0"]) == 1
    assert "mine.txt" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_command_line(tmp_path, capsys):
    command = ["--out", str(tmp_path / "a"), "--train", "2", "--val", "1", "--test", "1", "--size", "32"]
    assert write.main(command) == 0 and ATTRIBUTION in capsys.readouterr().out
    assert write.main(command) == 0 and "up to date" in capsys.readouterr().out
    assert write.main([*command, "--test-size", "0"]) == 1
    assert "test_size must be at least 16, got 0" in capsys.readouterr().err


def test_splits_are_disjoint(folder, sampled):
    images = [hashlib.sha256(s["png"]).digest() for split in SPLITS for s in read_samples(folder, split)]
    assert len(set(images)) == len(images)
    layouts = [scene.placements for split in SPLITS for scene in sampled[split]]
    assert len(set(layouts)) == len(layouts)


def test_held_out_pairs_occur_in_test_only(sampled):
    def share(split: str) -> float:
        pairs = [[(BY_NAME[a], BY_NAME[b]) for a, b in combinations(names(scene), 2)] for scene in sampled[split]]
        return float(np.mean([any(layout.held_out(*pair) for pair in scene) for scene in pairs]))

    assert share("train") == share("val") == 0
    assert 0.4 < share("test") < 0.6
    pairs = list(combinations(concepts()[:200], 2))
    hits = [layout.held_out(a, b) for a, b in pairs]
    assert hits == [layout.held_out(b, a) for a, b in pairs]
    deviation = (layout.HELD_OUT_SHARE * (1 - layout.HELD_OUT_SHARE) / len(pairs)) ** 0.5
    assert abs(np.mean(hits) - layout.HELD_OUT_SHARE) < 4 * deviation


def test_captions_name_and_count_every_object(sampled):
    sizes = Counter()
    for scene in sampled["train"] + sampled["test"]:
        caption = scene.caption
        sizes[len(scene.placements)] += 1
        assert len(caption.text.split()) <= MAX_WORDS, caption.text
        assert not re.search(r"\b(left|right)\b|  |\ba [aeio]|\ban [^aeiouh]", caption.text), caption.text
        assert all(a[1] < b[0] for a, b in pairwise(sorted(caption.spans)))
        for i, group in enumerate(scene.groups):
            concept, count = BY_NAME[names(scene)[i]], len(group)
            assert caption.phrase(i) == (concept.plural if count > 1 else concept.name)
            before = caption.text[: caption.spans[i][0]]
            if concept.form == "some":
                assert count == 1 and before.endswith("some ")
            else:
                pair = f"pair{'s' if count > 1 else ''} of " if concept.form == "pair" else ""
                number = "an?" if count == 1 else NUMBERS[count]
                assert re.search(rf"\b{number} (big |small )?{pair}$", before), caption.text
    assert set(sizes) == {1, 2, 3, 4} and min(sizes[2], sizes[3]) > max(sizes[1], sizes[4])


def group(name: str, *boxes: tuple[float, float, float, float]) -> Group:
    return Group(BY_NAME[name], tuple(Box(*box) for box in boxes))


def texts(*groups: Group) -> set[str]:
    return {write_caption(groups, "striped orange", Random(seed)).text for seed in range(400)}


def test_spatial_words_are_true():
    owl, dog, pears = (
        group("owl", (0.3, 0.05, 0.6, 0.35)),
        group("dog", (0.35, 0.6, 0.6, 0.9)),
        group("pear", (0.1, 0.6, 0.3, 0.9), (0.7, 0.6, 0.9, 0.9)),
    )
    captions = texts(owl, dog)
    assert {"an owl above a dog", "a dog below an owl", "an owl and a dog on a striped orange background"} <= captions
    assert not any(re.search("dog (above|over)|owl (below|under)|next to|beside", text) for text in captions)
    captions = texts(dog, group("owl", (0.65, 0.62, 0.9, 0.92)))
    assert any("a dog next to an owl" in text for text in captions)
    assert not any(re.search("above|over|below|under", text) for text in captions)
    captions = texts(group("owl", (0.3, 0.3, 0.6, 0.6)), pears)  # one pear is beside rather than below
    assert not any(re.search("above|over|below|under|next to|beside", text) for text in captions)


def test_size_words_are_true():
    captions = texts(group("owl", (0, 0, 0.2, 0.2)), group("dog", (0.5, 0.5, 0.9, 0.9)))
    assert any("a small owl" in text for text in captions) and any("a big dog" in text for text in captions)
    assert not any("big owl" in text or "small dog" in text for text in captions)
    captions = texts(group("owl", (0, 0, 0.3, 0.3)), group("dog", (0.5, 0.5, 0.9, 0.9)))
    assert not any("big" in text or "small" in text for text in captions)


def on(scene: Scene, value: int, monkeypatch) -> np.ndarray:
    """The scene on a background of one gray value."""
    monkeypatch.setattr(draw, "paint_background", lambda _, side: Image.new("RGB", (side, side), (value,) * 3))
    return np.asarray(draw.render(scene, 64)[0], dtype=np.float64)


def test_masks_cover_what_is_drawn(sampled, monkeypatch):
    """Coverage of a pixel = 1 - (its difference between white and black background) / 255."""
    singles = [scene for scene in sampled["val"] if len(scene.placements) == 1][:30]
    other_looks = [layout.sample_scene("train", n, singles=100, varied=100) for n in range(30)]
    for scene in singles + other_looks:
        mask = draw.render(scene, 64)[1][0]
        coverage = 1 - (on(scene, 255, monkeypatch) - on(scene, 0, monkeypatch)).mean(axis=2) / 255
        opaque, rounding = OPAQUE / 255, 3 / 255
        assert coverage[mask].min() >= 2 * opaque / 4 - rounding  # two of four points are opaque
        assert coverage[~mask].max() <= (1 + 3 * opaque) / 4 + rounding  # at most one of four is
        monkeypatch.undo()


def test_masks_leave_out_what_is_hidden(sampled):
    hidden = 0
    for scene in sampled["val"][:150]:
        apart = replace(scene, groups=tuple((k,) for k in range(len(scene.placements))))
        visible = draw.render(apart, 128)[1]
        for k, mask in enumerate(visible):
            alone = replace(apart, placements=(scene.placements[k],), groups=((0,),))
            whole = draw.render(alone, 128)[1][0]
            assert not (mask & ~whole).any()
            assert not any((mask & other).any() for other in visible[k + 1 :])
            assert mask.sum() >= place.MIN_VISIBLE * whole.sum(), scene.caption.text
            hidden += mask.sum() < whole.sum()
        joined = draw.render(scene, 128)[1]
        for mask, group in zip(joined, scene.groups, strict=True):
            assert (mask == np.logical_or.reduce([visible[k] for k in group])).all()
    assert hidden > 20


def test_small_image_looks_like_a_reduced_large_one(sampled):
    some = sampled["test"][:12]
    small = [np.asarray(draw.render(scene, 64)[0], dtype=np.float64) for scene in some]
    large = [np.asarray(draw.render(scene, 256)[0].reduce(4), dtype=np.float64) for scene in some]
    distances = np.array([[np.abs(a - b).mean() for b in large] for a in small])
    own = np.diag(distances).copy()
    np.fill_diagonal(distances, np.inf)
    assert (own < 0.1 * distances.min(axis=1)).all(), own / distances.min(axis=1)


def naive_runs(mask: np.ndarray) -> list[int]:
    runs, value = [0], 0
    for column in range(mask.shape[1]):
        for row in range(mask.shape[0]):
            if bool(mask[row, column]) != value:
                runs.append(0)
                value = 1 - value
            runs[-1] += 1
    return runs


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (6, 9)])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_rle_equals_a_naive_one_and_round_trips(shape, share):
    mask = np.random.default_rng(0).random(shape) < share
    code = rle.encode(mask)
    assert code == {"size": list(shape), "counts": naive_runs(mask)}
    assert (rle.decode(json.loads(json.dumps(code))) == mask).all()


def test_rle_refuses_bad_input():
    with pytest.raises(ValueError, match=r"\[H, W\], got \[2, 2, 1\]"):
        rle.encode(np.zeros((2, 2, 1)))
    with pytest.raises(ValueError, match="add up to 2 x 3 = 6 pixels"):
        rle.decode({"size": [2, 3], "counts": [2, 3]})


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split must be one of"):
        layout.sample_scene("dev", 0)


def test_pair_and_uncounted_forms():
    jeans = texts(group("jeans", (0, 0, 0.2, 0.2), (0.5, 0.5, 0.7, 0.7)))
    assert any(text.startswith("two pairs of jeans") for text in jeans)
    grapes = texts(group("grapes", (0, 0, 0.4, 0.4)))
    assert any(text.startswith("there are some grapes") for text in grapes)
    assert isinstance(BY_NAME["grapes"], Concept)
