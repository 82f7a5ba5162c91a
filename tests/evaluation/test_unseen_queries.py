"""Retrieval of the queries whose objects are marked "unseen", apart from the whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from softmask.data import open_source
from softmask.evaluation import command, evaluate
from softmask.evaluation.gallery import build_gallery
from softmask.evaluation.one_pass import measure_one
from softmask.evaluation.readers import Reader, Scorer
from softmask.evaluation.retrieval import Recalls
from tests.support.data_files import write_tar
from tests.support.evaluation_files import PAIRS, Oracle, Words, scene, small_config, write_run, write_scenes

UNSEEN = (2, 3, 7)
KEYS = ["samples", "images", "cut", "itc", "chance", "rerank", "rerank_by", "gallery", "itm"]


def write_marked(path: Path, unseen: tuple[int, ...], *, captions: int = 1) -> str:
    """The scenes; the right box of those in `unseen` is marked. Every image has the number of captions."""
    members = []
    for number, (left, right) in enumerate(PAIRS):
        image, _, (name, text) = scene(number)
        content = json.loads(text)
        content["caption"] = [content["caption"], f"beside a {left} box a {right} one"][:captions]
        for place, entry in enumerate(content["objects"]):
            entry["unseen"] = place == 1 and number in unseen
        members += [image, (name, json.dumps(content).encode())]
    return str(write_tar(path, members))


def retrieve(tmp_path: Path, data: str, *, blind: bool = True) -> dict:
    config = small_config(tmp_path)
    scorer = Scorer(Oracle(config, blind=blind), Words(), config, batch_size=5)
    return measure_one(scorer, Reader(open_source(data)), Recalls(scorer, rerank=4))


def test_unseen_queries_are_ranked_over_the_whole_gallery(tmp_path: Path) -> None:
    """All first-stage scores are equal, so only the queries of the first four items win: 2 and 3, but not 7."""
    result = retrieve(tmp_path, write_marked(tmp_path / "test.tar", UNSEEN))
    apart = result["unseen"]
    assert (apart["samples"], apart["images"]) == (3, 3)
    for way in ("i2t", "t2i"):
        assert result["itm"][way]["r1"] == pytest.approx(4 / 12)
        assert apart["itm"][way] == pytest.approx({"r1": 2 / 3, "r5": 2 / 3, "r10": 2 / 3})
        assert apart["itc"][way] == {"r1": 0.0, "r5": 0.0, "r10": 0.0}
        assert apart["chance"][way] == pytest.approx({"r1": 1 / 12, "r5": 5 / 12, "r10": 10 / 12})


def test_images_and_captions_are_counted_apart(tmp_path: Path) -> None:
    result = retrieve(tmp_path, write_marked(tmp_path / "test.tar", UNSEEN, captions=2), blind=False)
    assert (result["unseen"]["samples"], result["unseen"]["images"]) == (6, 3)
    assert result["unseen"]["itc"]["t2i"]["r1"] == result["unseen"]["itm"]["i2t"]["r1"] == 1.0
    assert result["unseen"]["chance"]["i2t"]["r1"] == pytest.approx(2 / 24)


def test_data_without_unseen_objects_give_the_same_section(tmp_path: Path) -> None:
    """With no mark, with marks that are false, and with marks that are not true."""
    plain = retrieve(tmp_path, write_scenes(tmp_path / "plain.tar"))
    assert list(plain) == KEYS
    assert json.dumps(retrieve(tmp_path, write_marked(tmp_path / "false.tar", ()))) == json.dumps(plain)
    image, text, (name, content) = scene(0)
    odd = json.dumps(json.loads(content) | {"objects": [3, {"unseen": "true"}, {"unseen": 1}]}).encode()
    members = [member for number in range(1, 12) for member in scene(number)]
    data = str(write_tar(tmp_path / "odd.tar", [image, text, (name, odd), *members]))
    assert json.dumps(retrieve(tmp_path, data)) == json.dumps(plain)


def test_figures_of_a_model_equal_a_plain_count(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A model of random weights, from the command line: how many wrong answers score as high as the right one."""
    data = write_marked(tmp_path / "test.tar", UNSEEN)
    run = write_run(tmp_path, data)
    assert evaluate.main([str(run), "--data", data, "--rerank", "1"]) == 0
    apart = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["retrieval"]["unseen"]
    scorer = command.load_scorer(run / "checkpoints" / "step_00000005", batch_size=64)
    scores = build_gallery(scorer, Reader(open_source(data))).similarity.tolist()
    for way, rows in (("i2t", scores), ("t2i", [list(column) for column in zip(*scores, strict=True)])):
        ranks = [sum(other >= rows[query][query] for other in rows[query]) - 1 for query in UNSEEN]
        expected = {f"r{k}": sum(rank < k for rank in ranks) / len(UNSEEN) for k in (1, 5, 10)}
        assert apart["itc"][way] == pytest.approx(expected)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "unseen" in line]
    assert "3 images and 3 captions with unseen objects alone, R@1 i2t / t2i: itc " in line
    assert line.endswith("chance 8.3 / 8.3 %")
