"""The benchmark of tasks after pre-training compares values before it measures."""

from __future__ import annotations

import pytest
import torch

from benchmarks.step import bench_tasks
from tests.support.model_fixtures import small_config


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    text = {"vocab_size": bench_tasks.VOCABULARY}
    monkeypatch.setattr(bench_tasks, "config", lambda _size: small_config(text=text, soft_mask=False, queue_size=0))


@pytest.mark.parametrize("name", bench_tasks.CASES)
def test_both_ways_have_the_same_values_and_are_timed(name: str) -> None:
    torch.manual_seed(0)
    line = bench_tasks.measure(bench_tasks.CASES[name](32), turns=1)
    assert " x in processor time); values differ by " in line


def test_other_values_are_refused() -> None:
    case = bench_tasks.Comparison("two ways", lambda: torch.tensor([1.0]), lambda: torch.tensor([1.1]))
    with pytest.raises(AssertionError, match="two ways: values differ by 0.09"):
        bench_tasks.measure(case, turns=1)
