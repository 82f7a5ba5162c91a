"""The gallery of retrieval: shared over ranks, each image read and encoded once, tokens on the host, bounded passes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from softmask.data import decode_image, open_source
from softmask.evaluation import command, evaluate, readers, retrieval, sections
from softmask.evaluation.gallery import build_gallery
from softmask.evaluation.readers import GalleryPlace, Reader, Scorer
from softmask.evaluation.sections import Evaluation
from softmask.training.config import ConfigError
from tests.support.data_files import write_tar
from tests.support.evaluation_files import ALL, Oracle, Words, scene, small_config, write_run, write_scenes
from tests.support.train_fixtures import ROOT, run_on_ranks

PLACES: tuple[GalleryPlace, ...] = ("device", "host")


def make_scorer(tmp_path: Path, **options) -> Scorer:
    config = small_config(tmp_path)
    return Scorer(Oracle(config), Words(), config, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gallery")
    return write_run(folder, write_scenes(folder / "test.tar"))


def write_twice(path: Path, *, broken: tuple[int, ...] = ()) -> str:
    """The scenes twice, so that the captions of one image are far apart."""
    members = [member for number in ALL for member in scene(number, broken=number in broken)]
    write_tar(path, [*members, *((f"again-{name}", data) for name, data in members)])
    return str(path)


def test_any_number_of_ranks_finds_the_same(run: Path, tmp_path: Path) -> None:
    """To the last digit, with pictures that cannot be read, whose places others take. Each is named once."""
    data, figures, scores = write_twice(tmp_path / "test.tar", broken=(2, 5)), [], []
    for count in (1, 2, 3):
        folder = tmp_path / str(count)
        folder.mkdir()
        printed = run_on_ranks(count, ROOT / "tests" / "support" / "score_gallery.py", str(run), data, str(folder))
        result = json.loads((folder / "metrics.json").read_text())
        figures.append([result["retrieval"], result["grounding"]])
        lines = [line for one in printed for line in one.splitlines() if line.startswith("left out: ")]
        assert [line.split(":")[2] for line in lines] == ["0002", "0005", "again-0002", "again-0005"]
        for place in PLACES:
            found = [torch.load(folder / f"{place}.{rank}.pt") for rank in range(count)]
            assert sum(own for own, _, _ in found) == 6 and all(own for own, _, _ in found)
            scores.append([(similarity, match) for _, similarity, match in found])
    assert figures[0] == figures[1] == figures[2]
    assert figures[0][0]["images"] == 7 and figures[0][1]["samples"] == 20
    for one in (scores[0::2], scores[1::2]):
        first, *others = [pair for of_count in one for pair in of_count]
        for other in others:
            assert torch.equal(first[0], other[0]) and torch.equal(first[1].nan_to_num(9), other[1].nan_to_num(9))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The pictures that are decoded."""
    found: list[bytes] = []

    def counted(data: bytes) -> Image.Image:
        found.append(data)
        return decode_image(data)

    monkeypatch.setattr(readers, "decode_image", counted)
    return found


def test_an_image_is_decoded_and_encoded_once(tmp_path: Path, decoded: list[bytes]) -> None:
    scorer = make_scorer(tmp_path, batch_size=5)
    gallery = build_gallery(scorer, Reader(open_source(write_twice(tmp_path / "test.tar"))))
    assert len(decoded) == scorer.model.encoded == len(gallery.images) == 12 and len(gallery.captions) == 24
    assert gallery.images == list(range(12))
    assert [piece.rows for piece in gallery.pieces] == [slice(0, 5), slice(5, 10), slice(10, 12)]
    assert torch.equal(gallery.relevant, torch.eye(12, dtype=torch.bool).repeat(1, 2))


@pytest.mark.parametrize("pairs", [0, 7], ids=["all", "seven"])
def test_all_sections_share_one_pass(tmp_path: Path, decoded: list[bytes], pairs: int) -> None:
    """Each picture is decoded and encoded once, also where the gallery ends within a piece."""
    scorer = make_scorer(tmp_path, batch_size=5)
    reader = Reader(open_source(write_twice(tmp_path / "test.tar")))
    result = sections.evaluate(Evaluation(scorer, reader, pairs=pairs, rerank=4), sections.sections_of(scorer))
    assert list(result) == ["retrieval", "grounding"] and len(decoded) == scorer.model.encoded == 12
    assert (result["retrieval"]["samples"], result["grounding"]["samples"]) == (pairs or 24, 24)
    assert scorer.model.mapped == [5] * 8 + [4] * 2, "of twice as many captions as pictures in a piece, and two kinds"


def test_pictures_without_objects_are_not_decoded_for_grounding(tmp_path: Path, decoded: list[bytes]) -> None:
    members = [member for number in ALL for member in scene(number)[: 3 if number == 7 else 2]]
    write_tar(tmp_path / "test.tar", members)
    reader = Reader(open_source(str(tmp_path / "test.tar")))
    scorer = make_scorer(tmp_path, batch_size=5)
    result = sections.evaluate(Evaluation(scorer, reader, pairs=4, rerank=4), sections.sections_of(scorer))
    assert result["grounding"]["samples"] == 1 and len(decoded) == 4 + 1


def test_places_of_unreadable_samples_are_taken_by_others(tmp_path: Path) -> None:
    scorer = make_scorer(tmp_path, batch_size=3)
    reader = Reader(open_source(write_twice(tmp_path / "test.tar", broken=(0, 4, 6))))
    gallery = build_gallery(scorer, reader, pairs=6)
    assert gallery.images == [1, 2, 3, 5, 7, 8] and sorted(reader.skipped) == [0, 4, 6]
    assert scorer.model.encoded == 6
    gallery = build_gallery(scorer, reader, pairs=12)  # the last three are second captions of images in the gallery
    assert gallery.images == [1, 2, 3, 5, 7, 8, 9, 10, 11] and len(gallery.captions) == 12
    assert scorer.model.encoded == 6 + 9


def test_passes_are_bounded_and_an_image_is_projected_once(tmp_path: Path) -> None:
    scorer = make_scorer(tmp_path, batch_size=5)
    gallery = build_gallery(scorer, Reader(open_source(write_scenes(tmp_path / "test.tar"))))
    wanted = torch.zeros(12, 12, dtype=torch.bool)
    wanted[0], wanted[1, :2], wanted[3, 4:7] = True, True, True
    scores = retrieval.match_scores(scorer, gallery, wanted)
    assert scorer.model.passes == [4, 4, 4, 5] and scorer.model.projected == 3
    assert torch.equal(scores.isnan(), ~wanted) and scores[0].tolist() == [2.0] + [0.0] * 11
    scorer.model.passes.clear()
    assert retrieval.match_scores(scorer, gallery, wanted & False).isnan().all() and not scorer.model.passes


@pytest.mark.parametrize("precision, name", [("fp32", "float16"), ("fp16", "float16"), ("bf16", "bfloat16")])
def test_the_host_keeps_half_precision(run: Path, precision: str, name: str) -> None:
    scores, wanted, half = [], torch.ones(12, 12, dtype=torch.bool), getattr(torch, name)
    for place in PLACES:
        scorer = command.load_scorer(run / "checkpoints" / "step_00000005", batch_size=5, gallery=place)
        scorer.config.train.precision = precision
        gallery = build_gallery(scorer, Reader(open_source(str(run.parent / "test.tar"))))
        kept = {gallery.text_tokens.dtype, *(piece.tokens.dtype for piece in gallery.pieces)}
        assert kept == {half if place == "host" else torch.float32}
        scores.append(retrieval.match_scores(scorer, gallery, wanted))
    assert 0 < (scores[0] - scores[1]).abs().max() < 2 * torch.finfo(half).eps * scores[0].abs().max()


def test_tokens_beyond_half_precision_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = make_scorer(tmp_path, gallery="host")
    encode = scorer.model.encode_image
    monkeypatch.setattr(scorer.model, "encode_image", lambda images: (1e6 * encode(images)[0], encode(images)[1]))
    reader = Reader(open_source(write_scenes(tmp_path / "test.tar")))
    with pytest.raises(ConfigError, match=r"--gallery host: .* exceed torch.float16; take --gallery device"):
        build_gallery(scorer, reader)
    scorer.config.train.precision = "bf16"
    assert len(build_gallery(scorer, reader).images) == 12


def test_the_command_takes_the_host(run: Path, tmp_path: Path) -> None:
    found = {}
    for place in PLACES:
        output = tmp_path / f"{place}.json"
        data = ("--data", str(run.parent / "test.tar"), "--output", str(output), "--gallery", place)
        assert evaluate.main([str(run), *data]) == 0
        found[place] = json.loads(output.read_text())["retrieval"]
    assert found["host"]["itc"] == found["device"]["itc"]
    assert (found["host"]["gallery"], found["device"]["gallery"]) == ("host", "device")
