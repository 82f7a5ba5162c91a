"""Write report.html of a run, a self-contained page: curves, metrics, and examples of what the model does.

    python train/report.py RUN --data 'data/test-*.tar' [--output RUN/report.html] [--scenes 12]

RUN is a run's folder with log.jsonl, a complete checkpoint and the metrics.json of train/evaluate.py, whose options of
data and sizes are the report's, too. All images are embedded in the page. What it shows of a task is the view that the
task names (view.py): retrieval and, of SoftMask++, word maps, of the phrases of "objects" in a sample's .json (format:
softmask/evaluation/evaluate.py) or of all content words if there are no objects; of SyCoCa generated captions and
reconstructions; of tasks after pre-training their figures, with those of `evaluate.py --blank --output RUN/blank.json`
if that file is there, and right and wrong examples. The footer quotes an ATTRIBUTION.txt beside the data. Unreadable
samples are skipped and named on stderr. If the command fails, it writes nothing.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from softmask.arguments import positive
from softmask.evaluation.command import (
    add_data_options,
    check_output,
    evaluation_facts,
    finish,
    load_scorer,
    name_skipped,
    open_reader,
    sizes,
    use_answer_list,
)
from softmask.files import write_atomically
from softmask.report.facts import facts, kicker, lead
from softmask.report.metrics_file import is_number, read_metrics
from softmask.report.page import Page, render
from softmask.report.svg import Series
from softmask.report.view import Given, find_view
from softmask.tasks.base import Curve, Task
from softmask.tasks.downstream import DownstreamTask, paths_of
from softmask.training.checkpoint.state import CheckpointError, read_state
from softmask.training.checkpoint.store import best_checkpoint
from softmask.training.config import load_config
from softmask.training.logs import read_lines

GENERAL = {"loss": Curve("Loss, all terms", "nats"), "lr": Curve("Learning rate")}
NO_CURVE = ("step", "epoch", "seconds", "samples_per_second")


# -- the run ---------------------------------------------------------------------------------------


def read_log(path: Path) -> list[dict]:
    """The rows of log.jsonl, without an incomplete last line, which is still being written."""
    return [row for _, row in read_lines(path)]


def curves(rows: list[dict], known: dict[str, Curve]) -> list[Series]:
    """One series per logged number: the loss, the task's curves (`known`), the learning rate, then all others."""
    logged = dict.fromkeys(key for row in rows for key in row if key not in NO_CURVE and is_number(row[key]))
    titles = {"loss": GENERAL["loss"]} | known | GENERAL
    keys = [key for key in titles if key in logged] + [key for key in logged if key not in titles]
    series = []
    for key in keys:
        points = [(row["step"], float(row[key])) for row in rows if is_number(row.get(key))]
        curve = titles.get(key, Curve(key))
        series.append(Series(curve.title, curve.unit, [step for step, _ in points], [value for _, value in points]))
    return series


def validations(path: Path, task: Task) -> list[Series]:
    """The scores of validation in events.jsonl, as one series; none if nothing was validated."""
    if not (isinstance(task, DownstreamTask) and path.is_file()):
        return []
    rows = [row for _, row in read_lines(path) if row.get("event") == "validation" and is_number(row.get("score"))]
    if not rows:
        return []
    steps, scores = [row["step"] for row in rows], [100 * row["score"] for row in rows]
    return [Series(f"Validation: {task.metric}", "× 100", steps, scores, smoothed=False)]


def attribution(data: str) -> str:
    """The text of all ATTRIBUTION.txt files beside the data."""
    folders = [Path(data).parent] if Path(data).is_dir() else [Path(path).parent for path in paths_of(data)]
    files = [folder / "ATTRIBUTION.txt" for folder in dict.fromkeys(folders)]
    return "\n\n".join(file.read_text(encoding="utf-8", errors="replace").strip() for file in files if file.is_file())


# -- command line ----------------------------------------------------------------------------------


def check_evaluation(path: Path, was: dict, now: dict, *, blank: bool = False) -> None:
    """Checks that metrics.json is of this checkpoint, these data and these sizes, and of grey pictures if `blank`.

    Raises:
        CheckpointError: naming what differs.
    """
    changed = {key: f"{key} {was.get(key)!r}, not {value!r}" for key, value in now.items() if was.get(key) != value}
    if "digest" in changed:
        changed["digest"] = "the data"
    if was.get("blank", False) != blank:
        changed["blank"] = f"its pictures, which are {'not grey' if blank else 'grey (--blank)'}"
    if changed:
        differs = f"belongs to another evaluation: it differs in {'; '.join(changed.values())}"
        how = f"--blank --output {path} " if blank else ""
        raise CheckpointError(f"{path} {differs}; run train/evaluate.py {how}with this report's options first")


def read_blank(path: Path, needed: dict, now: dict) -> dict | None:
    """blank.json, the evaluation of grey pictures, if there is one; it must be of the same checkpoint and data."""
    if not path.is_file():
        return None
    result = read_metrics(path, needed)
    check_evaluation(path, result["evaluation"], now, blank=True)
    return result


def build_page(options: argparse.Namespace) -> Page:
    """Collects everything that the page shows."""
    run, data = options.run, options.data
    checkpoint = best_checkpoint(run)
    config = load_config(checkpoint / "config.yaml")
    task = config.find_task()
    view = find_view(task, config.task)
    result = read_metrics(run / "metrics.json", view.needed)
    rows = read_log(run / "log.jsonl")
    drawn = curves(rows, task.curves)
    scorer = load_scorer(checkpoint, **sizes(options))
    use_answer_list(options, scorer)
    reader = open_reader(scorer, data, options.image_root, split=options.split)
    now = evaluation_facts(scorer, reader, checkpoint)
    check_evaluation(run / "metrics.json", result["evaluation"], now, blank=config.data.blank)
    grey = view.shows_blank and not config.data.blank
    blank = read_blank(run / "blank.json", view.needed, now) if grey else None
    try:
        shown = view.show(Given(scorer, reader, result, blank, options.scenes))
    finally:
        name_skipped(reader)
    return Page(
        kicker=kicker(scorer),
        method=task.title(scorer.config.model),
        run=run.resolve().name,
        lead=lead(scorer),
        tiles=shown.tiles,
        facts=facts(scorer, read_state(checkpoint), rows),
        curves=[*drawn[:1], *validations(run / "events.jsonl", task), *drawn[1:]],
        sections=shown.sections,
        training=result["training"],
        evaluation=result["evaluation"],
        attribution=attribution(data),
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write report.html of a run, a self-contained page.")
    parser.add_argument("run", type=Path, help="a run's folder")
    add_data_options(parser)
    parser.add_argument("--output", type=Path, help="default: report.html in RUN")
    parser.add_argument(
        "--scenes",
        type=positive,
        default=12,
        help="examples shown, of word maps, captions, reconstructions or answers (default 12)",
    )
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> str:
    """Writes report.html. Returns a line that names it."""
    output = options.output or options.run / "report.html"
    check_output(output, ".html")
    write_atomically(output, render(build_page(options)))
    return f"written: {output} ({math.ceil(output.stat().st_size / 1e6)} MB)"


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    return finish("report", lambda: run(options), smaller="lower --batch-size")


if __name__ == "__main__":
    sys.exit(main())
