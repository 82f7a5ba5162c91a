"""The ablations as Markdown: mean and spread of every row, and deviations from the expected order.

Pure functions of the contents of metrics.json.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean, stdev

from benchmarks.ablation.rows import AblationError, Row, Study

INTRODUCTION = """# Ablation

What each part of the two methods changes, on the demo's scenes and at its size. `make ablation` trains and evaluates
the rows, keeps the configuration and metrics of every run in [record/](record), and generates this file from them; do
not edit it by hand. The recorded runs, of 22 and 23 November 2026, come from a revision that masked [SEP] and, with
masked captions, those of the first steps too, applied weight decay to position embeddings, and re-ranked by the
difference of ITM's logits.
[results.md](../../docs/results.md) has the demos' figures of a later revision.

Figures are percentages on test scenes never seen in training: mean ± sample standard deviation over the seeds. mTR and
mIR are the means of R@1, R@5 and R@10 by ITC, image to caption and caption to image. Two rows are compared once all
seeds of both are finished; equal means agree with any order. A difference is compared with the larger of the two rows'
standard deviations, its spread. The papers trained on millions of images, a run here trains for minutes on tens of
thousands of drawn scenes: an effect that is missing here is not refuted.
"""


@dataclass(frozen=True)
class Results:
    """The recorded runs of one study."""

    study: Study
    steps: int  # per run
    seeds: int  # per row, once it is finished
    metrics: dict[str, list[dict]]  # row name -> metrics.json of its recorded seeds

    def shares(self, row: str, figure: str) -> list[float]:
        read = (self.study.figures | self.study.beside)[figure]
        return [share for metrics in self.metrics[row] if (share := read(metrics)) is not None]

    def is_finished(self, row: str) -> bool:
        return len(self.metrics[row]) == self.seeds


@dataclass(frozen=True)
class Reversal:
    """A pair of rows in the opposite of the expected order; difference and spread are fractions."""

    figure: str
    above: str  # title of the row that was expected to be lower
    below: str
    difference: float
    spread: float | None  # None with one seed


def render(results: Sequence[Results]) -> str:
    """The README."""
    return "\n".join([INTRODUCTION, *map(section, results)])


def section(results: Results) -> str:
    study = results.study
    size = gallery(results)
    length = f"`{study.config.name}`, {results.steps} steps" + (f"; retrieval among {size} images" if size else "")
    paragraphs = [
        f"## {study.title}",
        _wrapped(f"{length}. {study.note}"),
        table(results),
        order(results),
    ]
    return "\n\n".join(paragraphs) + "\n"


def gallery(results: Results) -> int | None:
    """The number of images in the retrieval gallery; None without a recorded run.

    Raises:
        AblationError: runs with galleries of different sizes.
    """
    rows = results.metrics.values()
    sizes = {metrics["retrieval"]["images"] for row in rows for metrics in row}
    if len(sizes) > 1:
        raise AblationError(
            f"{results.study.method}: expected retrieval among equally many images in every metrics.json, "
            f"got {sorted(sizes)}; remove the runs of one size to run them again"
        )
    return sizes.pop() if sizes else None


def table(results: Results) -> str:
    study = results.study
    has_published = any(row.published for row in study.rows)
    heads = ["row", "settings", "seeds", *study.figures, *study.beside]
    heads += ["paper: " + " / ".join(study.figures)] * has_published
    lines = [_line(heads), "|" + "---|" * len(heads)]
    for row in study.rows:
        settings = " ".join(f"`{override}`" for override in row.overrides)
        cells = [row.title, settings, seeds_cell(results, row), *figure_cells(results, row)]
        published = " / ".join(f"{value:.1f}" for value in row.published)
        lines.append(_line([*cells, *([published] * has_published)]))
    return "\n".join(lines)


def seeds_cell(results: Results, row: Row) -> str:
    there = len(results.metrics[row.name])
    return str(there) if results.is_finished(row.name) else f"{there} of {results.seeds}, not finished"


def figure_cells(results: Results, row: Row) -> Iterator[str]:
    for figure in (*results.study.figures, *results.study.beside):
        shares = results.shares(row.name, figure)
        spread = f" ± {100 * stdev(shares):.1f}" if len(shares) > 1 else ""
        yield f"{100 * fmean(shares):.1f}{spread}" if shares else ""


def order(results: Results) -> str:
    """How many pairs of rows are in the expected order, and a list of the others with difference and spread."""
    study = results.study
    pairs = [(figure, *pair) for figure, pairs in study.order.items() for pair in pairs]
    compared = [pair for pair in pairs if all(results.is_finished(row) for row in pair[1:])]
    waiting = len(pairs) - len(compared)
    missing = f"{waiting} of {len(pairs)} comparisons wait for unfinished rows."
    if not compared:
        return missing
    found = [reversal for pair in compared if (reversal := reversed_pair(results, *pair))]
    agreeing = len(compared) - len(found)
    said = f"{agreeing} of {len(compared)} comparisons (of two rows by one figure) agree with {study.order_name}."
    if waiting:
        said += f" {missing}"
    if not found:
        return _wrapped(said)
    return "\n".join([_wrapped(f"{said} The others:"), "", *_by_figure(found)])


def reversed_pair(results: Results, figure: str, low: str, high: str) -> Reversal | None:
    """The pair, if the row expected to be higher has the lower mean."""
    below, above = results.shares(high, figure), results.shares(low, figure)
    difference = fmean(above) - fmean(below)
    if difference <= 0:
        return None
    titles = {row.name: row.title for row in results.study.rows}
    spread = max(stdev(above), stdev(below)) if results.seeds > 1 else None
    return Reversal(figure, titles[low], titles[high], difference, spread)


def _by_figure(reversals: list[Reversal]) -> Iterator[str]:
    """A list item per figure, on one line each: wrapped, a title's "+" could start another item."""
    for figure, group in groupby(reversals, key=lambda reversal: reversal.figure):
        yield f"- {figure}: " + ", ".join(f"{one.above} above {one.below} by {_size(one)}" for one in group)


def _size(reversal: Reversal) -> str:
    points = f"{100 * reversal.difference:.1f} points"
    if reversal.spread is None:
        return f"{points} (one seed has no spread)"
    relation = "more than" if reversal.difference > reversal.spread else "within"
    return f"{points} ({relation} the spread of {100 * reversal.spread:.1f})"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
