"""The report's page is well-formed, self-contained and complete; its drawing functions."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from softmask.evaluation import evaluate
from softmask.report import build as report
from softmask.report.images import HEAT, data_uri, heat_colours, heat_overlay, limited, soft_masked
from softmask.report.retrieval import ANSWERS, CAPTION_QUERIES, IMAGE_QUERIES, retrieval_table
from softmask.report.svg import Series, line_chart, outline_path, smooth, ticks
from softmask.report.view import spread
from softmask.report.word_maps import content_words, emphasized
from tests.support.evaluation_files import Words, write_plain, write_run, write_scenes
from tests.support.html_page import Page, check_self_contained


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    data = write_scenes(folder / "test.tar")
    (folder / "ATTRIBUTION.txt").write_text("Drawings by <someone>, CC BY-SA 4.0", encoding="utf-8")
    run = write_run(folder, data)
    assert evaluate.main([str(run), "--data", data]) == 0
    assert report.main([str(run), "--data", data, "--scenes", "5", "--batch-size", "2"]) == 0
    return run


@pytest.fixture(scope="module")
def page(run):
    return Page((run / "report.html").read_text(encoding="utf-8"))


def test_page_is_well_formed_and_self_contained(page, run):
    check_self_contained(page)
    assert (run / "report.html").read_text(encoding="utf-8").count("<style>") == 1


def test_page_is_complete(page):
    text = " ".join(page.text)
    assert len(page.all("article", "scene")) == 5
    assert len(page.all("div", "word")) == 10
    assert len(page.all("div", "query")) == CAPTION_QUERIES
    assert len(page.all("div", "card")) == IMAGE_QUERIES
    assert len(page.all("figure", "thumb")) == CAPTION_QUERIES * ANSWERS
    assert len(page.all("svg", "chart")) == 3  # loss, itc, lr
    assert "Drawings by <someone>, CC BY-SA 4.0" in text
    result = [f"{100 * value:.1f}" for value in (1 / 12, 5 / 12, 10 / 12, 128 / 1024)]
    assert all(number in text for number in result)


def test_svg_paths_are_finite(page):
    paths = [attributes["d"] for attributes in page.all("path")]
    assert paths
    for path in paths:
        assert re.fullmatch(r"(?:[MLHhVv]-?[\d.]+(?: -?[\d.]+)?)+", path), path
        assert all(math.isfinite(float(number)) for number in re.findall(r"-?[\d.]+", path))


def test_content_words_replace_missing_objects(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    data = write_plain(tmp_path / "plain.tar", ["a red box & the <b>green</b> one", "there is a box"])
    assert evaluate.main([str(tmp_path / "run"), "--data", data]) == 0
    assert report.main([str(tmp_path / "run"), "--data", data]) == 0
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "<b>" not in text and "Pointing game" not in text
    assert len(page.all("article", "scene")) == 2
    assert len(page.all("div", "word")) == 6  # red, box, b, green, b; box
    assert not page.all("path", "line")


def test_failures_write_nothing(run, tmp_path, capsys):
    data = str(run.parent / "test.tar")
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    (tmp_path / "run" / "report.html").write_text("old", encoding="utf-8")
    assert report.main([str(tmp_path / "run"), "--data", data]) == 1
    assert "metrics.json" in capsys.readouterr().err
    assert report.main([str(run), "--data", str(tmp_path / "none.tar"), "--output", str(tmp_path / "new.html")]) == 1
    assert "none.tar does not exist" in capsys.readouterr().err
    assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8") == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_metrics_of_another_evaluation_are_refused(run, tmp_path, capsys):
    data = str(run.parent / "test.tar")
    copy, output = tmp_path / "run", ["--output", str(tmp_path / "new.html")]
    shutil.copytree(run, copy)
    other = write_scenes(tmp_path / "other.tar", (0, 1, 2))
    cases = {
        ("--data", other): "it differs in the data; run",
        ("--data", data, "--image-size", "64"): "it differs in image_size 32, not 64; run",
        (
            "--data",
            data,
            "--text-length",
            "9",
            "--resize",
            "crop",
        ): "16, not 9; resize 'squash', not 'crop'",
    }
    for options, message in cases.items():
        assert report.main([str(copy), *options, *output]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line and line.endswith("run train/evaluate.py with this report's options first")
    newer = copy / "checkpoints" / "step_00000007"
    shutil.copytree(copy / "checkpoints" / "step_00000005", newer)
    assert report.main([str(copy), "--data", data, *output]) == 1
    assert "checkpoint 'step_00000005', not 'step_00000007'" in capsys.readouterr().err
    (newer / "trainer.json").write_text("{}")
    assert evaluate.main([str(copy), "--data", data]) == 1
    assert "trainer.json: lacks step, micro_batches, seconds" in capsys.readouterr().err
    (copy / "metrics.json").write_text('{"retrieval": {}}')
    assert report.main([str(copy), "--data", data, *output]) == 1
    assert "metrics.json: lacks training, evaluation" in capsys.readouterr().err
    assert not (tmp_path / "new.html").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("retrieval", 3), ("retrieval.samples", "many"), ("retrieval.samples", -1), ("retrieval.itc.i2t.r1", None),
        ("retrieval.rerank", "16"), ("retrieval.rerank_by", "foo"), ("training", {}), ("training.seconds", "long"),
        ("evaluation", None), ("grounding", {}), ("zero_shot", {}), ("captioning", {}), ("reconstruction", []),
        ("retrieval.unseen", {}),
    ],
)  # fmt: skip
def test_damaged_metrics_are_named(run, tmp_path, capsys, key, value):
    shutil.copytree(run, tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    *parents, last = key.split(".")
    node = metrics
    for name in parents:
        node = node[name]
    node[last] = value
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "run" / "report.html").unlink()
    assert report.main([str(tmp_path / "run"), "--data", str(run.parent / "test.tar")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"metrics.json: {key}" in line and "run train/evaluate.py again" in line
    assert not (tmp_path / "run" / "report.html").exists()


def test_table_has_rows_of_unseen_queries():
    """Their figures stand in the columns of the whole gallery's stages; without such queries the table has two rows."""

    def both(share: float) -> dict:
        return {way: {f"r{k}": share + k / 1000 + (way == "t2i") / 10 for k in (1, 5, 10)} for way in ("i2t", "t2i")}

    whole = {"itc": both(0.5), "chance": both(0.1), "itm": both(0.7)}
    unseen = {"samples": 1040, "images": 20, "itc": both(0.2), "chance": both(0.1), "itm": both(0.3)}
    rows = Page(retrieval_table(whole)).text
    assert not any("unseen" in text for text in rows) and "50.1" in rows
    found = [text for text in Page(retrieval_table(whole | {"unseen": unseen})).text if text.strip()]
    start = found.index("20 images with unseen objects → caption")
    assert " ".join(found[start + 1 : start + 10]) == "20.1 20.5 21.0 30.1 30.5 31.0 10.1 10.5 11.0"
    start = found.index("1,040 captions of unseen objects → image")
    assert " ".join(found[start + 1 : start + 10]) == "30.1 30.5 31.0 40.1 40.5 41.0 20.1 20.5 21.0"


def test_unusable_log_values_are_left_out():
    rows = [{"step": 1, "a": "x", "b": 10**400, "c": 1e308, "d": None}, {"step": 2, "a": 1.0, "e": math.nan}]
    (series,) = report.curves(rows, {})
    assert (series.title, series.steps, series.values) == ("a", [2], [1.0])


def test_broken_log_lines_are_skipped(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo', encoding="utf-8")
    assert report.read_log(log) == [{"step": 1, "loss": 2.0}]
    log.write_text('{"step": 1}\n\0\0\0\0\n[3]\n{"step": 2}\n', encoding="utf-8")
    assert report.read_log(log) == [{"step": 1}, {"step": 2}]


def test_curves_start_with_the_loss_and_keep_unknown_terms():
    rows = [{"step": 1, "mine": 3.0, "loss": 2.0, "seconds": 1.0}, {"step": 2, "mine": 4.0, "loss": 1.0}]
    first, second = report.curves(rows, {})
    assert (first.steps, first.values, first.unit) == ([1, 2], [2.0, 1.0], "nats")
    assert (second.title, second.values) == ("mine", [3.0, 4.0])


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [math.nan, math.inf], [2.0, math.nan, 1e-9, -5.0], [1e6, 2e6]])
def test_chart_of_odd_values_is_finite(values):
    chart = line_chart(Series("x < y", "", list(range(len(values))), values), width=300, height=200)
    assert "nan" not in re.sub(r"aria-label=\"[^\"]*\"", "", chart) and 'inf"' not in chart
    assert "x &lt; y" in chart
    Page(chart)


def test_long_labels_fit_beside_a_chart() -> None:
    for values in ([1.0, 9.0], [0.06041, 0.06119], [0.123451, 0.123459]):
        chart = line_chart(Series("x", "", [1, 2], values, smoothed=False), width=300, height=200)
        labels = re.findall(r'x="(\d+)" y="[\d.]+" text-anchor="end">([^<]+)<', chart)
        assert len(labels) > 1 and all(int(x) >= 7 * len(text) for x, text in labels), labels


def test_unsmoothed_chart_goes_through_its_values():
    chart = line_chart(Series("x", "", [1, 2, 3], [1.0, 9.0, 2.0], smoothed=False), width=300, height=200)
    assert chart.count('<circle class="end"') == 4 and 'class="raw"' not in chart  # the last once more
    assert ">2.00</text>" in chart


def test_smoothing_equals_a_naive_gaussian_mean():
    values = np.random.default_rng(0).normal(size=120)
    sigma, reach = 2.4, 8
    for i, got in enumerate(smooth(values)):
        near = [j for j in range(len(values)) if abs(i - j) <= reach]
        weights = [math.exp(-0.5 * ((i - j) / sigma) ** 2) for j in near]
        assert got == pytest.approx(sum(w * values[j] for w, j in zip(weights, near, strict=True)) / sum(weights))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 0.07, [0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07]),
        (-3, 2, [-3, -2, -1, 0, 1, 2]),
    ],
)
def test_ticks_are_round_numbers_in_the_range(low, high, expected):
    assert ticks(low, high, 6) == pytest.approx(expected)


def test_outline_draws_each_edge_of_the_mask_once():
    mask = np.random.default_rng(0).random((9, 13)) < 0.4
    drawn = set()
    for x, y, way, length in re.findall(r"M(\d+) (\d+)([hv])(\d+)", outline_path(mask)):
        for step in range(int(length)):
            place = (int(x) + step, int(y)) if way == "h" else (int(x), int(y) + step)
            assert (way, *place) not in drawn
            drawn.add((way, *place))
    padded = np.pad(mask, 1)
    expected = set()
    for y in range(10):
        for x in range(14):
            if padded[y, x + 1] != padded[y + 1, x + 1] and x < 13:
                expected.add(("h", x, y))
            if padded[y + 1, x] != padded[y + 1, x + 1] and y < 9:
                expected.add(("v", x, y))
    assert drawn == expected
    assert outline_path(np.zeros((4, 4), bool)) == ""


def test_heat_colours_pass_their_anchors_and_fade_out():
    anchors = np.linspace(0, 1, len(HEAT))
    assert np.allclose(heat_colours(anchors), HEAT)
    assert np.allclose(heat_colours(np.array([-1.0, 2.0])), HEAT[[0, -1]])
    middle = (anchors[0] + anchors[1]) / 2
    assert np.allclose(heat_colours(np.array(middle)), (HEAT[0] + HEAT[1]) / 2)
    image = Image.new("RGB", (2, 1), (10, 200, 30))
    cold, hot = np.asarray(heat_overlay(image, torch.tensor([[0.0, 1.0]]))).astype(int)[0]
    assert cold.max() == cold.min()  # grey
    assert abs(hot - HEAT[-1]).max() < abs(cold - HEAT[-1]).max()


def test_soft_mask_fades_to_the_mean_colour():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8))
    plane = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    mean, strength = (0.5, 0.25, 0.75), 0.8
    result = np.asarray(soft_masked(image, plane, mean=mean, strength=strength)).astype(np.float64)
    grey = 255 * np.array(mean)
    weight = 1 - strength * plane.double().numpy()[..., None]
    expected = grey + (np.asarray(image) - grey) * weight
    assert np.abs(result - expected).max() <= 0.5 + 1e-9  # rounding to whole numbers


def test_limited_keeps_small_images_and_proportions():
    small, large = Image.new("RGB", (50, 40)), Image.new("RGB", (1000, 500))
    assert limited(small, 100) is small
    assert limited(large, 100).size == (100, 50)
    assert Image.open(io.BytesIO(base64.b64decode(data_uri(large).split(",")[1]))).size == (1000, 500)


def test_spread_is_even_and_within_range():
    assert spread(5, 12) == [0, 1, 2, 3, 4]
    assert spread(12, 3) == [2, 6, 10]
    assert len(set(spread(13, 12))) == 12


def test_content_words_leave_out_function_words():
    caption = "a red box beside a green one"
    words = content_words(caption, Words()([caption], max_length=16), 0)
    assert [(word.text, word.span, word.tokens) for word in words] == [
        ("red", (2, 5), [2]),
        ("box", (6, 9), [3]),
        ("green", (19, 24), [6]),
    ]


def test_caption_marks_phrases_once():
    marked = emphasized("a red & blue box", [(2, 5), (8, 16), (8, 12)])
    assert marked == "a <em>red</em> &amp; <em>blue box</em>"
