"""Scores of captions, zero-shot classification and reconstructions on cases with known results."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from softmask import reference
from softmask.data import DataError, open_source
from softmask.evaluation import captioning, reconstruction, zero_shot
from softmask.evaluation.one_pass import Encoded, measure_one
from softmask.evaluation.readers import Reader, Sample, Scorer, pixels
from softmask.report import generated as report_generation
from tests.support.data_files import write_tar
from tests.support.evaluation_files import (
    ALL,
    COLOURS,
    PAIRS,
    Oracle,
    Words,
    scene,
    small_config,
    write_plain,
    write_scenes,
)

JAVA = pytest.param(True, marks=pytest.mark.skipif(not captioning.has_java(), reason="no Java"))


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    return list(Reader(open_source(write_scenes(tmp_path / "test.tar"))).all())


@pytest.fixture
def scorer(tmp_path: Path) -> Scorer:
    return Scorer(Oracle(small_config(tmp_path)), Words(), small_config(tmp_path), batch_size=5)


# -- scores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("java", [False, JAVA])
def test_scores_of_equal_similar_and_unrelated_captions(java: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captioning, "has_java", lambda: java)
    true = [f"a {a} box beside a {b} one" for a, b in PAIRS]
    perfect = captioning.score([f"A {a} box, beside a {b} one." for a, b in PAIRS], [[text] for text in true])
    assert perfect["bleu4"] == pytest.approx(1.0)
    assert perfect["rouge_l"] == pytest.approx(1.0)
    assert perfect["cider"] == pytest.approx(10.0)
    assert ("meteor" in perfect) == java
    mixed = captioning.score(true[1:] + true[:1], [[text] for text in true])
    assert mixed["cider"] < perfect["cider"]
    assert mixed["bleu4"] < 1.0
    foreign = captioning.score(["nothing of this kind"] * 12, [[text] for text in true])
    assert foreign["cider"] == pytest.approx(0.0, abs=1e-6)
    assert foreign["rouge_l"] == 0.0


@pytest.mark.parametrize("java", [False, JAVA])
def test_line_breaks_in_a_caption_do_not_shift_the_others(java: bool) -> None:
    texts = ["a red box", "a blue owl\rbeside\u2028a cat", "a green box"]
    words = captioning.tokenized([[text] for text in texts], java=java)
    assert words == {0: ["a red box"], 1: ["a blue owl beside a cat"], 2: ["a green box"]}


JAVAS = {
    "is missing": "exit 1",
    "cannot run a class": 'test "$1" = -version',
    "hangs": 'test "$1" = -version || sleep 60',
    "loses lines": 'test "$1" = -version || echo a',
    "fails after the tokenizer": 'case "$1" in -version) ;; -cp) cat ;; *) exit 3 ;; esac',
    "hangs after the tokenizer": 'case "$1" in -version) ;; -cp) cat ;; *) exec sleep 60 ;; esac',
}


@pytest.mark.parametrize("script", JAVAS.values(), ids=JAVAS)
def test_failing_java_loses_only_its_own_scores(tmp_path: Path, monkeypatch, capsys, script: str) -> None:
    (tmp_path / "java").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(captioning, "JAVA_SECONDS", 0.5)
    captioning.has_java.cache_clear()
    captioning.meteor.cache_clear()
    try:
        given = [["a red box"], ["a blue box"]]
        tokenizer, scores = captioning.score_all({"one": ["a red box", "a blue box"], "two": ["a", "b"]}, given)
    finally:
        captioning.has_java.cache_clear()
        captioning.meteor.cache_clear()
    assert tokenizer == "words" and scores["one"]["bleu4"] > scores["two"]["bleu4"]
    assert all(set(one) == {"cider", "bleu4", "rouge_l"} for one in scores.values())
    errors = capsys.readouterr().err
    assert errors.startswith("captions are scored without Java: ") or script == "exit 1"


def test_rouge_uses_the_longest_common_subsequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """LCS of "the cat sat down" and "the cat ran" is 2: precision 2/4, recall 2/3, F with beta 1.2."""
    monkeypatch.setattr(captioning, "has_java", lambda: False)
    precision, recall, beta = 2 / 4, 2 / 3, 1.2
    expected = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    assert captioning.score(["the cat sat down"], [["the cat ran"]])["rouge_l"] == pytest.approx(expected)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], list[list[str]]]]:
    """Captions are the true ones, and the decoder's alone those of the next image. What is scored, with references."""
    scored: list[tuple[list[str], list[list[str]]]] = []

    def write(_scorer: Scorer, seen: Encoded, options: captioning.CaptionOptions) -> captioning.Captions:
        true = [sample.caption for sample in seen.first]
        return captioning.Captions(true, true[1:] + true[:1] if options.beams > 1 else [])

    def score_all(candidates: dict[str, list[str]], references: list[list[str]]) -> tuple[str, dict]:
        scored.append((candidates["chosen"], references))
        return score(candidates, references)

    score = captioning.score_all
    monkeypatch.setattr(captioning, "write_captions", write)
    monkeypatch.setattr(captioning, "score_all", score_all)
    monkeypatch.setattr(captioning, "has_java", lambda: False)
    return scored


def captioned(scorer: Scorer, reader: Reader, training: Reader | None = None, *, pairs: int = 0, **options) -> dict:
    measure = captioning.Captioning(scorer, training, captioning.CaptionOptions(**options))
    return measure_one(scorer, reader, measure, pairs=pairs)


@pytest.mark.parametrize("pairs, references", [(0, [2, 2, 2]), (4, [2, 1, 1])])
def test_all_captions_of_an_image_are_references(scorer, tmp_path, told, pairs, references) -> None:
    """Two of scene 0 cannot be read, and their places are taken by captions of an image that is captioned already."""
    numbers, names = [0, 1, 2, 3, 0, 1, 2, 3], [f"{index}" for index in range(8)]
    members = [
        (f"{name}{suffix}", data)
        for name, number in zip(names, numbers, strict=True)
        for (_, data), suffix in zip(scene(number, broken=number == 0), (".png", ".txt", ".json"), strict=True)
    ]
    write_tar(tmp_path / "twice.tar", members)
    scorer.batch_size = 3
    section = captioned(scorer, Reader(open_source(str(tmp_path / "twice.tar"))), pairs=pairs)
    ((written, given),) = told
    assert [len(texts) for texts in given] == references and section["samples"] == 3
    assert written == [texts[0] for texts in given]


def test_captioning_without_images_is_an_error(scorer: Scorer, tmp_path: Path) -> None:
    reader = Reader(open_source(write_scenes(tmp_path / "test.tar", broken=ALL)))
    with pytest.raises(DataError, match="no readable sample to caption"):
        captioned(scorer, reader)


@pytest.mark.parametrize(("total", "wanted", "expected"), [(4, 0, [0, 1, 2, 3]), (3, 9, [0, 1, 2]), (10, 3, [0, 3, 6])])
def test_training_images_are_evenly_spaced(total: int, wanted: int, expected: list[int]) -> None:
    assert captioning.chosen_numbers(total, wanted) == expected


def test_nearest_caption_is_that_of_the_nearest_image(scorer, samples, tmp_path) -> None:
    training = Reader(open_source(write_scenes(tmp_path / "train.tar", reversed(ALL))))
    features = scorer.model.encode_image(pixels(scorer, samples))[1]
    nearest, known = captioning.nearest_captions(scorer, features, training, range(12))
    assert nearest == [sample.caption for sample in samples] and known == nearest[::-1]
    few, known = captioning.nearest_captions(scorer, features, training, [3, 9])
    assert len(known) == 2 and set(few) == set(known) and few[8] == nearest[8] and few[2] == nearest[2]


def test_section_compares_with_training_captions(scorer, tmp_path, told) -> None:
    reader = Reader(open_source(write_scenes(tmp_path / "test.tar")))
    training = Reader(open_source(write_scenes(tmp_path / "train.tar")))
    section = captioned(scorer, reader, training, beams=2)
    assert (section["samples"], section["beams"], section["tokenizer"]) == (12, 2, "words")
    assert section["nearest"] == {
        key: section[key] for key in ("cider", "bleu4", "rouge_l")
    }  # the oracle finds the right nearest image
    assert section["random"]["cider"] < section["cider"] and section["neighbours"] == 12
    assert section["beams_alone"]["cider"] < section["cider"]
    few = captioned(scorer, reader, training, neighbours=3)
    assert few["neighbours"] == 3 and few["nearest"]["cider"] < section["nearest"]["cider"]
    alone = captioned(scorer, reader, beams=1)
    assert not {"random", "nearest", "beams_alone"} & set(alone)


# -- zero-shot -------------------------------------------------------------------------------------


class Boxes:
    """An image's feature is the colour of its left box, a prompt's the colour it names, with two colours swapped."""

    def __init__(self, oracle: Oracle, swapped: tuple[str, ...] = ()) -> None:
        self.oracle, self.swapped = oracle, swapped

    def encode_image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens, _ = self.oracle.encode_image(images)
        return tokens, tokens[:, 0].unflatten(1, (4, 4)).sum(2)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        first = Words.vocabulary.index("red")
        names = list(COLOURS)
        colours = [names[int(row[row >= first][0]) - first] for row in input_ids]
        told = [self.swapped[1 - self.swapped.index(name)] if name in self.swapped else name for name in colours]
        features = torch.stack([torch.eye(4)[names.index(name)] + 0.01 for name in told])
        return features[:, None], features


@pytest.mark.parametrize(("swapped", "hits"), [((), 7), (("red", "green"), 1)])  # blue is right in both cases
def with_objects(path: Path, objects: dict[int, list[dict]]) -> Reader:
    """The scenes with other objects, and those alone."""
    members = []
    for number, listed in objects.items():
        image, text, (name, content) = scene(number)
        members += [image, text, (name, json.dumps(json.loads(content) | {"objects": listed}).encode())]
    write_tar(path, members)
    return Reader(open_source(str(path)))


@pytest.mark.parametrize(("swapped", "hits"), [((), 7), (("red", "green"), 1)])  # blue is right in both cases
def test_zero_shot_counts_images_of_one_object(scorer, tmp_path, monkeypatch, swapped, hits) -> None:
    monkeypatch.setattr(zero_shot, "TEMPLATES", ("{}", "a {}"))
    scorer.model, scorer.batch_size = Boxes(scorer.model, swapped), 4
    # Scenes 0 to 8 begin with red, green and blue, three each; the last with black.
    objects = {number: [{"phrase": PAIRS[number][0], "concept": PAIRS[number][0]}] for number in range(10)}
    objects[9].append(objects[9][0])  # two objects
    objects[8][0]["phrase"] = "blues"  # a plural
    objects[7][0]["count"] = 2  # a count, for words whose plural is the same
    objects[0][0]["count"] = 1
    classes = [zero_shot.Class(name, f"a {name} box") for name in COLOURS]
    measure = zero_shot.ZeroShot(scorer, classes)
    section = measure_one(scorer, with_objects(tmp_path / "objects.tar", objects), measure)
    expected = {"samples": 7, "classes": 4, "top5": 1.0, "chance": 0.25}
    assert section == expected | {"top1": hits / 7}
    assert measure_one(scorer, with_objects(tmp_path / "none.tar", {10: [], 11: []}), measure) is None


def test_malformed_objects_have_no_class(samples) -> None:
    sample = samples[0]
    sample.objects = [{"phrase": ["red"], "concept": ["red"]}]
    assert zero_shot.only_class(sample, {"red": 0}) is None
    sample.objects = ["red"]
    assert zero_shot.only_class(sample, {"red": 0}) is None
    assert sample.bad_objects[f"{sample.name}: objects[0]"].startswith("expected phrase, span, mask and concept")


def test_malformed_class_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    for text in ("[", "[]", '[{"name": "a"}]', json.dumps([{"name": "a", "phrase": "an a"}] * 2)):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=r"classes\.json: expected"):
            zero_shot.read_classes(path)
    path.write_text(json.dumps([{"name": "a", "phrase": "an a", "more": 1}]), encoding="utf-8")
    assert zero_shot.read_classes(path) == [zero_shot.Class("a", "an a")]


# -- reconstruction --------------------------------------------------------------------------------


class Reconstructor:
    """Hides the left half. Predicts zeros, or with `listens` the truth if the caption names the left box."""

    patch_size, patch_grid = 8, (4, 4)

    def __init__(self, oracle: Oracle, *, listens: bool) -> None:
        self.oracle, self.listens = oracle, listens
        self.encode_image = oracle.encode_image

    def hidden_patches(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return (torch.arange(16) % 4 < 2).expand(len(images), -1)

    def reconstruct(self, images: Tensor, hidden: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        patches = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        truth = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        seen, told = self.oracle.encode_image(images)[0][:, 0], self.oracle.encode_text(input_ids, attention_mask)[0]
        same = (seen.unflatten(1, (4, 4)).sum(2) * told[:, 0].unflatten(1, (4, 4)).sum(2)).sum(1)
        return truth * same[:, None, None] if self.listens else torch.zeros_like(truth)


@pytest.fixture
def scenes(tmp_path: Path) -> Reader:
    return Reader(open_source(write_scenes(tmp_path / "scenes.tar")))


def reconstructed(scorer: Scorer, reader: Reader) -> dict | None:
    return measure_one(scorer, reader, reconstruction.Reconstruction(scorer, reader))


@pytest.mark.parametrize("listens", [True, False])
@pytest.mark.parametrize("batch_size", [5, 64])
def test_gap_is_the_effect_of_the_caption(
    scorer: Scorer, scenes: Reader, samples: list[Sample], listens: bool, batch_size: int
) -> None:
    scorer.batch_size = batch_size
    scorer.model = Reconstructor(scorer.model, listens=listens)
    scorer.config.model = SimpleNamespace(normalize_pixels=True)
    section = reconstructed(scorer, scenes)
    assert section["samples"] == 12
    images = pixels(scorer, samples)
    hidden = scorer.model.hidden_patches(images, None, None)
    blind = reference.masked_patch_loss(torch.zeros(12, 16, 192), images, hidden, patch_size=8, reduction="none")
    blind = blind.sum(1) / 8
    wrong = [PAIRS[i][0] != PAIRS[(i + 1) % 12][0] for i in range(12)]  # the next image has another left box
    expected = torch.where(torch.tensor(wrong), blind, 0.0) if listens else torch.zeros(12)
    assert section["gap"] == pytest.approx(expected.mean().item(), abs=1e-6)
    half = 1.96 * expected.std().item() / 12**0.5
    assert section["high"] - section["low"] == pytest.approx(2 * half, abs=1e-5)
    assert section["right"] == pytest.approx(0.0 if listens else blind.mean().item(), abs=1e-5)
    assert section["wrong"] == pytest.approx(section["right"] + section["gap"])


def test_images_with_equal_captions_are_not_compared(scorer: Scorer, samples: list[Sample], tmp_path: Path) -> None:
    for sample in samples:
        sample.caption = "a red box beside a green one"
    data = write_plain(tmp_path / "equal.tar", [sample.caption for sample in samples])
    assert reconstructed(scorer, Reader(open_source(data))) is None
    assert report_generation.reconstruction_views(scorer, samples) == []


class RandomReconstructor(Reconstructor):
    """Hides random patches, like `masks: random`."""

    def hidden_patches(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.rand(len(images), 16).argsort(1) < 8


def test_random_patches_are_reproducible(scorer: Scorer, scenes: Reader) -> None:
    scorer.model = RandomReconstructor(scorer.model, listens=True)
    scorer.config.model = SimpleNamespace(normalize_pixels=True)
    torch.manual_seed(1)
    first = reconstructed(scorer, scenes)
    state = torch.get_rng_state()
    assert reconstructed(scorer, scenes) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_other_caption_of_the_same_image_is_not_a_wrong_caption(scorer: Scorer, scenes: Reader, tmp_path: Path) -> None:
    scorer.model = Reconstructor(scorer.model, listens=True)
    scorer.config.model = SimpleNamespace(normalize_pixels=True)
    members = []
    for number in ALL:
        (_, image), (_, text), _ = scene(number)
        for letter, caption in (("a", text), ("b", text + b" and a box")):
            members += [(f"{number:04d}{letter}.png", image), (f"{number:04d}{letter}.txt", caption)]
    write_tar(tmp_path / "doubled.tar", members)
    doubled = Reader(open_source(str(tmp_path / "doubled.tar")))
    assert reconstructed(scorer, doubled) == reconstructed(scorer, scenes)
