"""Fixtures of `make bench`: `bench` measures a case. All rows are printed at the end and, with --csv, written to a
file.

With --compare REVISION, a case is timed against that git revision instead and fails if it is over 10 % slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.revisions import Rival

RESULTS = pytest.StashKey[list]()
LINES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("softmask")
    group.addoption("--compare", metavar="REVISION", help="time every op against this git revision")
    group.addoption("--dtype", choices=harness.DTYPES, default="fp32", help="dtype of the inputs")
    group.addoption("--csv", type=Path, metavar="FILE", help="write the table as CSV")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = []
    config.stash[LINES] = []


@pytest.fixture(scope="session")
def rival(request: pytest.FixtureRequest) -> Iterator[Rival | None]:
    """A checkout of the revision of --compare; None without it."""
    revision = request.config.getoption("--compare")
    if revision is None:
        yield None
        return
    with Rival(revision) as built:
        yield built


@pytest.fixture
def bench(request: pytest.FixtureRequest, benchmark, rival: Rival | None) -> Callable[..., None]:
    """Measures one op at one size."""

    def run(op: str, size: str, make: Callable[[], harness.Bench]) -> None:
        if rival is not None:
            module = f"benchmarks.ops.{Path(request.module.__file__).stem}"
            benchmark.pedantic(lambda: rival.check(module, size), rounds=1)
            return
        dtype = request.config.getoption("--dtype")
        with harness.defaults(harness.DTYPES[dtype]):
            case = make()
            result = harness.measure(op, dtype, size, case)
            benchmark.extra_info.update(over_floor=result.over_floor, **result.baselines)
            benchmark.pedantic(case.ours, rounds=5, warmup_rounds=1)  # for pytest-benchmark's own table and files
        request.config.stash[RESULTS].append(result)

    return run


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Adds a line to the summary at the end of the session."""
    if request.config.getoption("--compare"):
        pytest.skip("compares two implementations, not two revisions")
    return request.config.stash[LINES].append


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    results = config.stash[RESULTS]
    if results:
        terminalreporter.section("softmask")
        terminalreporter.write_line(harness.table(results))
        if config.getoption("--csv"):
            harness.write_csv(results, config.getoption("--csv"))
    if config.stash[LINES]:
        terminalreporter.section("a training step")
        terminalreporter.write_line("\n".join(config.stash[LINES]))
