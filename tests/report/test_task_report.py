"""The report of tasks after pre-training: figures beside baselines, right and wrong examples, maps of their words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from softmask.evaluation import captioning, evaluate
from softmask.report import build as report
from softmask.report.tasks.examples import choose, selection
from softmask.report.view import find_view
from softmask.tasks.base import Task
from softmask.training.config import ConfigError
from tests.support.html_page import Page, check_self_contained
from tests.support.task_fixtures import WRITERS, finetune_here, pretrained, task_config, write_classification

TASKS = (*WRITERS, "classification")
HOSTILE = 'a <b>red</b> & "blue" box'


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained(tmp_path_factory.mktemp("pretrained"))


def write_data(folder: Path, task: str) -> Path:
    """A task's data, where some examples have something unseen and one's text looks like markup."""
    if task == "classification":
        return write_classification(folder)
    data = WRITERS[task](folder / f"{task}.json")
    entries = json.loads(data.read_text())
    for entry in entries[::3]:
        entry["unseen"] = True
    entries[0]["question" if task == "vqa" else "sentence"] = HOSTILE
    if task == "vqa":
        for number, entry in enumerate(entries):
            entry |= {"answer_type": "other", "question_type": ("a <box>", "a paper")[number % 2]}
    data.write_text(json.dumps(entries))
    return data


@pytest.fixture(scope="module")
def runs(init: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Task -> a run that is trained, validated and evaluated, and its data."""
    made = {}
    for task in TASKS:
        folder = tmp_path_factory.mktemp(task)
        data = write_data(folder, task)
        listed = [f"head.answer_list={folder / 'answer_list.json'}"] if task == "vqa" else []
        config = task_config(folder, task, data, f"data.val={data}", "train.validate_every=2", *listed, init=init)
        finetune_here(config)
        run = Path(config.output)
        assert evaluate.main([str(run), "--data", str(data)]) == 0
        blank = ["--blank", "--output", str(run / "blank.json")]
        assert evaluate.main([str(run), "--data", str(data), *blank]) == 0
        made[task] = run, data
    return made


def page_of(run: Path, data: Path, *options: str) -> Page:
    assert report.main([str(run), "--data", str(data), *options]) == 0
    return Page((run / "report.html").read_text(encoding="utf-8"))


def texts(page: Page) -> str:
    return " ".join(" ".join(page.text).split())


@pytest.mark.parametrize("task", TASKS)
def test_page_shows_figures_baselines_and_examples(task: str, runs: dict[str, tuple[Path, Path]]) -> None:
    run, data = runs[task]
    page = page_of(run, data)
    check_self_contained(page)
    figures, grey = (json.loads((run / f"{name}.json").read_text())[task] for name in ("metrics", "blank"))
    key = "top1" if task == "classification" else "accuracy"
    text = texts(page)
    assert "Fine-tuning report" in text and f"Validation: {key}" in text and "fine-tuned from" in text
    for share in (figures[key], grey[key], *(figures[name] for name in ("majority", "chance") if name in figures)):
        assert f"{100 * share:.1f}" in text
    assert "Grey pictures" in text and f"{figures['samples']:,}" in text
    examples = page.all("article", "example")
    assert len(examples) == 12 and len(page.all("table", "guesses")) == 12
    assert f"from {init_name(run)}" in text


def init_name(run: Path) -> str:
    (line,) = [line for line in (run / "config.yaml").read_text().splitlines() if line.startswith("init: ")]
    return line.removeprefix("init: ")


@pytest.mark.parametrize("task", WRITERS)
def test_words_have_a_map_for_every_picture(task: str, runs: dict[str, tuple[Path, Path]]) -> None:
    page = page_of(*runs[task], "--scenes", "24", "--batch-size", "5")
    assert HOSTILE not in page.source and HOSTILE in "".join(page.text)
    pictures = 2 if task == "nlvr2" else 1
    shown = len(page.all("article", "example")) * pictures
    assert len(page.all("article", "example")) == 24
    maps = len(page.all("figure", "map"))
    assert maps >= 24 and len(page.all("img")) == shown + maps * pictures
    assert page.source.count("with something that training never shows") == 8
    assert "Grad-CAM" in texts(page)


@pytest.mark.parametrize("task", ["snli_ve", "nlvr2"])
def test_confusion_matrix_counts_predictions_by_right_answer(task: str, runs: dict[str, tuple[Path, Path]]) -> None:
    run, data = runs[task]
    counts = json.loads((run / "metrics.json").read_text())[task]["confusion"]
    source = page_of(run, data).source
    body = source.split('<table class="confusion">')[1].split("</table>")[0]
    found = [int(cell.split("<small>")[1].split("</small>")[0]) for cell in body.split("<td style")[1:]]
    assert found == [count for row in counts for count in row]
    shares = [float(cell.split("<b>")[1].split("</b>")[0]) for cell in body.split("<td style")[1:]]
    assert shares == [round(100 * count / max(sum(row), 1), 1) for row in counts for count in row]


def test_vqa_has_a_row_for_every_type_and_answers_without_a_list(
    runs: dict[str, tuple[Path, Path]], tmp_path: Path, init: Path
) -> None:
    run, data = runs["vqa"]
    text = texts(page_of(run, data))
    for words in ("By answer type", "By question type", "a <box> 12", "a paper 12", "With something unseen", "of 10)"):
        assert words in text
    config = task_config(tmp_path, "vqa", data, "train.steps=1", init=init)  # which writes its answers
    finetune_here(config)
    assert evaluate.main([config.output, "--data", str(data)]) == 0
    page = page_of(Path(config.output), data)
    assert len(page.all("article", "example")) == 12 and "Grey pictures" not in texts(page)


def test_classification_names_the_number_of_classes_and_no_maps(runs: dict[str, tuple[Path, Path]]) -> None:
    page = page_of(*runs["classification"])
    assert "classes 4" in texts(page) and "Grad-CAM" not in texts(page) and not page.all("figure", "map")
    assert len(page.all("img")) == 12


@pytest.mark.parametrize("task", ["snli_ve", "vqa"])
def test_files_without_answers_are_shown(task: str, runs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    run, data = runs[task]
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(data.parent, tmp_path / "data", ignore=shutil.ignore_patterns(task))
    unanswered = [
        {key: value for key, value in entry.items() if key not in ("label", "answer")}
        for entry in json.loads(data.read_text())
    ]
    (tmp_path / "data" / data.name).write_text(json.dumps(unanswered))
    options = [str(tmp_path / "run"), "--data", str(tmp_path / "data" / data.name)]
    for more in ([], ["--blank", "--output", str(tmp_path / "run" / "blank.json")]):
        assert evaluate.main([*options, *more]) == 0
    text = texts(page_of(tmp_path / "run", tmp_path / "data" / data.name))
    assert "without answers" in text and "right answers are not known" in text and "Right answer" not in text


def test_figures_of_grey_pictures_are_never_mistaken_for_others(
    runs: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, data = runs["snli_ve"]
    shutil.copytree(run, tmp_path / "run")
    options = [str(tmp_path / "run"), "--data", str(data), "--output", str(tmp_path / "new.html")]
    shutil.copy(run / "metrics.json", tmp_path / "run" / "blank.json")
    assert report.main(options) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "blank.json belongs to another evaluation: it differs in its pictures, which are not grey" in line
    assert f"run train/evaluate.py --blank --output {tmp_path / 'run' / 'blank.json'} with" in line
    shutil.copy(run / "blank.json", tmp_path / "run" / "metrics.json")
    assert report.main(options) == 1
    assert (
        "metrics.json belongs to another evaluation: it differs in its pictures, which are grey"
        in (capsys.readouterr().err.splitlines()[-1])
    )
    assert not (tmp_path / "new.html").exists()


@pytest.mark.parametrize(("task", "key", "value"), [
    ("snli_ve", "confusion", [[1, 2], [3, 4]]), ("snli_ve", "confusion", [[1, 2, 3], [4, 5, 6], [7, 8, -1]]),
    ("nlvr2", "accuracy", "high"), ("nlvr2", "unseen", {"samples": 3}), ("vqa", "samples", None),
    ("vqa", "question_type", {"is": {"samples": 1}}), ("classification", "top5", [1]), ("nlvr2", "consistency", "x"),
])  # fmt: skip
def test_damaged_figures_are_named(
    task: str,
    key: str,
    value: object,
    runs: dict[str, tuple[Path, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    run, data = runs[task]
    shutil.copytree(run, tmp_path / "run")
    result = json.loads((run / "metrics.json").read_text())
    result[task][key] = value
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(result))
    assert report.main([str(tmp_path / "run"), "--data", str(data)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"metrics.json: {task}.{key}" in line and "run train/evaluate.py again" in line


def test_unreadable_pictures_are_named_and_left_out(
    runs: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, data = runs["snli_ve"]
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(data.parent, tmp_path / "data", ignore=shutil.ignore_patterns("snli_ve"))
    (tmp_path / "data" / "7.png").write_bytes(b"no picture")
    (tmp_path / "run" / "blank.json").unlink()
    assert evaluate.main([str(tmp_path / "run"), "--data", str(tmp_path / "data" / data.name)]) == 0
    capsys.readouterr()
    page = page_of(tmp_path / "run", tmp_path / "data" / data.name, "--scenes", "24")
    assert len(page.all("article", "example")) == 23
    assert "7.png" in capsys.readouterr().err


def test_captioning_shows_scores_and_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captioning, "has_java", lambda: False)  # which takes seconds to start
    run = pretrained(tmp_path, method="sycoca")
    data = tmp_path / "train.tar"
    config = task_config(tmp_path, "captioning", data, f"data.val={data}", "train.steps=2", init=run)
    finetune_here(config)
    assert evaluate.main([config.output, "--data", str(data), "--beams", "2"]) == 0
    page = page_of(Path(config.output), data, "--scenes", "3")
    check_self_contained(page)
    text = texts(page)
    for words in ("CoCa, captioning", "Best of 2 beams", "BLEU-4", "Validation: cider"):
        assert words in text
    assert len(page.all("div", "card")) == 3 and "Recall" not in text


def test_retrieval_keeps_its_page(init: Path, tmp_path: Path) -> None:
    data = init.parent / "train.tar"
    config = task_config(tmp_path, "retrieval", data, "train.steps=1", init=init)
    finetune_here(config)
    assert evaluate.main([config.output, "--data", str(data), "--pairs", "32"]) == 0
    text = texts(page_of(Path(config.output), data))
    assert "Caption → image" in text and "Fine-tuning report" in text and "Examples" not in text


def test_tasks_without_a_view_are_refused() -> None:
    class Own(Task):
        view = ""

    with pytest.raises(ConfigError, match="a run of own has no report; its figures are in metrics.json"):
        find_view(Own(), "own")
    for name, words in (
        ("nowhere:View", "cannot be imported"),
        ("softmask.report.view:Shown", "expected a subclass of"),
        ("softmask.report.view", "cannot be imported"),
    ):
        Own.view = name
        with pytest.raises(ConfigError, match=words):
            find_view(Own(), "own")


def test_examples_are_half_wrong_and_evenly_spaced() -> None:
    right: dict[int, bool | None] = {number: number % 10 != 0 for number in range(100)}
    chosen = choose(list(right), right, 12)
    assert len(set(chosen)) == 12 and chosen == sorted(chosen)
    assert sum(right[number] is False for number in chosen) == 6
    few: dict[int, bool | None] = {number: number not in (3, 70) for number in range(100)}
    chosen = choose(list(few), few, 12)
    assert len(chosen) == 12 and {3, 70} <= set(chosen)
    only: dict[int, bool | None] = dict.fromkeys(range(100), False)
    assert choose(list(only), only, 12) == choose(list(only), dict.fromkeys(range(100)), 12)
    assert choose([4, 8], {4: True, 8: False}, 12) == [4, 8]
    assert choose([4, 8], {4: True, 8: False}, 1) == [4]
    note = selection(few, chosen, total=400)
    assert note.startswith(
        "Of 100 examples spaced evenly over the data, 2 of the 2 that the model answers wrongly and 10"
    )
