"""The tables of studies: means, paired differences with their intervals, and what is missing."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from benchmarks.ablation import run as ablation
from benchmarks.ablation.rows import SEEN, UNSEEN
from benchmarks.studies import table
from benchmarks.studies.study import StudyError
from benchmarks.studies.table import Difference, Results, difference
from tests.support.study_fixtures import SOFTMASK_PP, SYCOCA, line_of, made_metrics, measured_of


def render(results: Sequence[Results]) -> str:
    return table.render(ablation.INTRODUCTION, results)


def sycoca_results(shares: dict[str, list[float]], *, seeds: int = 2) -> Results:
    """One run per share of a row, with seeds from 0 on."""
    made = {name: [measured_of(made_metrics(itc=share)) for share in row] for name, row in shares.items()}
    measured = {row.name: dict(enumerate(made.get(row.name, []))) for row in SYCOCA.rows}
    return Results(SYCOCA, steps=700, seeds=seeds, measured=measured)


def test_table_has_means_and_unfinished_rows() -> None:
    text = render([sycoca_results({"itc": [0.1, 0.2], "coca": [0.3]})])
    assert line_of(text, "ITC")[2:] == ["2", "15.0", "", "50.0", "", "13.5 / 14.8"]
    assert line_of(text, "CoCa (ITC + IC)")[2:] == ["1 of 2, not finished", "30.0", "", "50.0", "", "16.1 / 16.0"]
    assert line_of(text, "SyCoCa")[2:] == ["0 of 2, not finished", "", "", "", "", "18.3 / 18.4"]
    assert "`sycoca.yaml`, 700 steps; retrieval among 256 images." in text


def test_figures_of_both_hands_come_from_their_sections() -> None:
    unseen, seen = made_metrics(itc=0.1, itm=0.2, pointing=0.3), made_metrics(itc=0.6, itm=0.7)
    unseen["retrieval"]["itc"]["i2t"] = {"r1": 0.1, "r5": 0.2, "r10": 0.6}
    unseen["retrieval"]["itm"]["i2t"] = {"r1": 0.4, "r5": 0.9, "r10": 0.9}
    measured = {row.name: {} for row in SOFTMASK_PP.rows} | {"albef": {0: measured_of(unseen, seen)}}
    text = render([Results(SOFTMASK_PP, steps=700, seeds=3, measured=measured)])
    assert line_of(text, "ALBEF")[2:] == ["1 of 3, not finished", "20.0", "30.0", "30.0", "60.0", "70.0"]
    assert line_of(text, "row")[3:] == list(SOFTMASK_PP.figures)


def test_differences_are_paired_by_seed_with_a_t_interval() -> None:
    """Expected by hand: of 1, 2 and 6 points the mean is 3, the standard error 1.5275, and t 4.303."""
    results = sycoca_results({"itc": [0.10, 0.30, 0.20, 0.90], "coca": [0.11, 0.32, 0.26]})
    (coca,) = [row for row in SYCOCA.rows if row.name == "coca"]
    found = difference(results, coca, SYCOCA.figures["mR"])
    assert found.mean == pytest.approx(0.03) and found.half == pytest.approx(4.303 * 0.015275, rel=1e-3)
    assert not found.is_beyond_interval and Difference(-0.03, 0.02).is_beyond_interval
    line = line_of(render([results]), "CoCa (ITC + IC) − ITC")
    assert line[1:] == ["3", "+3.0 (-3.6 to +9.6)", "", "+0.0 (+0.0 to +0.0)", ""]


def test_differences_need_two_pairs_for_an_interval_and_runs_of_both_rows_to_be_there() -> None:
    shares = {"itc": [0.1, 0.2], "coca": [0.4], "sycoca": [0.5]}
    text = render([sycoca_results(shares)])
    assert line_of(text, "CoCa (ITC + IC) − ITC")[1:3] == ["1", "+30.0"]
    assert line_of(text, "SyCoCa − CoCa (ITC + IC)")[1:3] == ["1", "+10.0"] and "random masks −" not in text
    certain = render([sycoca_results({"itc": [0.1, 0.2], "coca": [0.3, 0.4001]})])
    assert line_of(certain, "CoCa (ITC + IC) − ITC")[2] == "**+20.0** (+19.9 to +20.1)"
    assert "difference" not in render([sycoca_results({"itc": [0.1]})]).partition("## SyCoCa")[2]
    many = sycoca_results({"itc": [0.1] * 11, "coca": [0.2] * 11})
    with pytest.raises(StudyError, match="sycoca: expected at most 10 seeds, got 11"):
        render([many])


def test_a_figure_that_a_row_lacks_is_empty() -> None:
    results = sycoca_results({"itc": [0.1, 0.2], "coca": [0.3, 0.3]})
    for measured, cider in zip(results.measured["coca"].values(), (1.0, 1.2), strict=True):
        measured[UNSEEN]["captioning"] = {"cider": cider}
    text = render([results])
    assert line_of(text, "ITC")[4] == "" and line_of(text, "CoCa (ITC + IC)")[4] == "110.0"
    assert line_of(text, "CoCa (ITC + IC) − ITC")[3] == ""


def test_galleries_of_different_sizes_are_refused() -> None:
    results = sycoca_results({"itc": [0.1, 0.2]})
    results.measured["itc"][0][SEEN]["retrieval"]["images"] = 12
    with pytest.raises(StudyError, match=r"expected retrieval among equally many images .* got \[12, 256\]"):
        table.section(results)


def test_runs_on_different_data_are_refused() -> None:
    results = sycoca_results({"itc": [0.1, 0.2], "coca": [0.3]})
    for row, digest in (("itc", "one"), ("coca", "one")):
        for measured in results.measured[row].values():
            measured[SEEN]["evaluation"] = {"digest": digest}
    table.section(results)
    results.measured["itc"][1][SEEN]["evaluation"] = {"digest": "two"}
    with pytest.raises(StudyError, match=r"the same data in seen.json .* itc/seed_0 and itc/seed_1 differ"):
        table.section(results)
