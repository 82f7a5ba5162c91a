"""Studies as Markdown: the mean of every row, and its paired difference to the row that it is compared with.

Pure functions of the recorded metrics.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from benchmarks.studies.study import Figure, Measured, Row, Study, StudyError

# Student's t, 97.5 %, by degrees of freedom from 1 on.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MOST_SEEDS = len(T_QUANTILES) + 1


@dataclass(frozen=True)
class Results:
    """The recorded runs of one study."""

    study: Study
    steps: int  # per run
    seeds: int  # per row, once it is finished
    measured: dict[str, dict[int, Measured]]  # row name -> seed -> metrics

    def shares(self, row: str, read: Figure) -> dict[int, float]:
        """seed -> value, of the seeds that have one."""
        values = {seed: read(measured) for seed, measured in self.measured[row].items()}
        return {seed: value for seed, value in values.items() if value is not None}

    def is_finished(self, row: str) -> bool:
        return len(self.measured[row]) == self.seeds


@dataclass(frozen=True)
class Difference:
    """Mean of the paired differences and half the width of its interval, as fractions; None with a single pair."""

    mean: float
    half: float | None

    @property
    def is_beyond_interval(self) -> bool:
        return self.half is not None and abs(self.mean) > self.half


def render(introduction: str, results: Sequence[Results]) -> str:
    """The README."""
    return "\n".join([introduction, *(section(one) for one in results if one.study.shown)])


def section(results: Results) -> str:
    study = results.study
    check_data(results)
    size = gallery(results)
    length = f"`{study.config.name}`, {results.steps} steps" + (f"; retrieval among {size} images" if size else "")
    paragraphs = [f"## {study.title}", _wrapped(f"{length}. {study.note}"), means(results)]
    differences = list(difference_lines(results))
    if differences:
        heads = ["difference", "pairs", *study.figures]
        beyond = "Differences beyond their interval are bold."
        paragraphs += ["\n".join([_line(heads), "|" + "---|" * len(heads), *differences]), beyond]
    return "\n\n".join(paragraphs) + "\n"


def check_data(results: Results) -> None:
    """StudyError for runs that were evaluated on different data under the same names."""
    rows = [row for row in results.study.rows if row.evaluations is None]
    for name in results.study.evaluations:
        runs = [(row, seed, run[name]) for row in rows for seed, run in results.measured[row.name].items()]
        digests: dict[str, str] = {}
        for row, seed, metrics in runs:
            digests.setdefault(metrics.get("evaluation", {}).get("digest", ""), f"{row.name}/seed_{seed}")
        if len(digests) > 1:
            first, other, *_ = digests.values()
            raise StudyError(
                f"{results.study.name}: expected the same data in {name}.json of all recorded runs, but {first} and "
                f"{other} differ; remove the runs of older data to run them again"
            )


def gallery(results: Results) -> int | None:
    """The number of images in the retrieval gallery; None without a recorded run.

    Raises:
        StudyError: runs with galleries of different sizes.
    """
    runs = [measured for row in results.measured.values() for measured in row.values()]
    sizes = {metrics["retrieval"]["images"] for run in runs for metrics in run.values() if "retrieval" in metrics}
    if len(sizes) > 1:
        raise StudyError(
            f"{results.study.name}: expected retrieval among equally many images in all recorded metrics, "
            f"got {sorted(sizes)}; remove the runs of one size to run them again"
        )
    return sizes.pop() if sizes else None


def means(results: Results) -> str:
    """A line per row: settings, number of seeds, means over the seeds, and the paper's figures."""
    study = results.study
    heads = ["row", "settings", "seeds", *study.figures]
    heads += ["paper: " + " / ".join(study.published)] * bool(study.published)
    lines = [_line(heads), "|" + "---|" * len(heads)]
    for row in study.rows:
        settings = " ".join(f"`{override}`" for override in row.overrides)
        shares = [results.shares(row.name, read).values() for read in study.figures.values()]
        cells = [row.title, settings, seeds_cell(results, row)]
        cells += [f"{100 * fmean(values):.1f}" if values else "" for values in shares]
        published = " / ".join(f"{value:.1f}" for value in row.published)
        lines.append(_line([*cells, *([published] * bool(study.published))]))
    return "\n".join(lines)


def seeds_cell(results: Results, row: Row) -> str:
    there = len(results.measured[row.name])
    return str(there) if results.is_finished(row.name) else f"{there} of {results.seeds}, not finished"


def difference_lines(results: Results) -> Iterator[str]:
    """A line per row with a base, once both have runs with equal seeds."""
    titles = {row.name: row.title for row in results.study.rows}
    for row in results.study.rows:
        if row.base and (pairs := results.measured[row.name].keys() & results.measured[row.base].keys()):
            cells = [_cell(difference(results, row, read)) for read in results.study.figures.values()]
            yield _line([f"{row.title} − {titles[row.base]}", str(len(pairs)), *cells])


def difference(results: Results, row: Row, read: Figure) -> Difference | None:
    """The row minus its base over the seeds that both have; None without one."""
    with_part, without = results.shares(row.name, read), results.shares(row.base, read)
    pairs = [with_part[seed] - without[seed] for seed in with_part.keys() & without.keys()]
    if not pairs:
        return None
    if len(pairs) == 1:
        return Difference(pairs[0], None)
    if len(pairs) > MOST_SEEDS:
        raise StudyError(f"{results.study.name}: expected at most {MOST_SEEDS} seeds, got {len(pairs)}")
    return Difference(fmean(pairs), T_QUANTILES[len(pairs) - 2] * stdev(pairs) / sqrt(len(pairs)))


def _cell(found: Difference | None) -> str:
    if found is None:
        return ""
    mean = f"{100 * found.mean:+.1f}"
    if found.half is None:
        return mean
    low, high = 100 * (found.mean - found.half), 100 * (found.mean + found.half)
    mean = f"**{mean}**" if found.is_beyond_interval else mean
    return f"{mean} ({low:+.1f} to {high:+.1f})"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
