"""The GPU's tests in several processes with a time limit each, and one small case of every op under compute-sanitizer.

python -m benchmarks.gpu.device.correct OUT SECONDS SIZE
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.device.jobs import Job, main, run_bounded
from benchmarks.gpu.device.record import LONGEST, NO_TIME, Row

TESTS = "tests/kernels/test_gpu.py"
SMALL_CASE = "test_small_case"  # of each op; compute-sanitizer slows others down too much
PROCESSES = 4  # that share the device
LIMIT = 150.0  # seconds of a process
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
SANITIZER = "compute-sanitizer"


def measure(job: Job) -> None:
    groups = collected() if job.size == "real" else {}
    with ThreadPoolExecutor(PROCESSES) as pool:  # where none could be collected, one process says why
        started = [pool.submit(run_group, job, name, tests) for name, tests in (groups or {"all": [TESTS]}).items()]
        for finished in as_completed(started):
            for row in finished.result():
                job.record.add(row)
    for test in groups.get(SMALL_CASE, ()):
        job.record.add(sanitized(job, test))


def collected() -> dict[str, list[str]]:
    """The tests of every function."""
    _, printed = run_bounded([*PYTEST, "--collect-only", TESTS], seconds=LIMIT, quiet=True)
    groups: dict[str, list[str]] = {}
    for test in filter(lambda line: "::" in line, printed.splitlines()):
        groups.setdefault(test.split("::")[1].partition("[")[0], []).append(test)
    return groups


def run_group(job: Job, name: str, tests: Sequence[str]) -> list[Row]:
    """A row for each test, or one for the group if its process did not end."""
    seconds = min(LIMIT, job.deadline.left())
    if seconds <= 0:
        return [{"test": name, "skipped": NO_TIME}]
    results = job.folder / f"{name}.xml"
    try:
        _, printed = run_bounded([*PYTEST, f"--junitxml={results}", *tests], seconds=seconds, quiet=True)
        return list(rows_of(results)) or [{"test": name, "error": last_lines(printed)}]
    except subprocess.TimeoutExpired:
        return [{"test": name, "error": f"stopped after {seconds:.0f} s"}]
    finally:
        results.unlink(missing_ok=True)


def rows_of(results: Path) -> Iterator[Row]:
    """The tests of a JUnit file; none if there is no whole one."""
    try:
        cases = list(ElementTree.parse(results).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return
    for case in cases:
        row: Row = {"test": case.get("name"), "seconds": float(case.get("time", "nan"))}
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                row["error"] = (found.get("message") or kind)[:LONGEST]
        if (skipped := case.find("skipped")) is not None:
            row["skipped"] = (skipped.get("message") or "")[:LONGEST]
        yield row


def sanitized(job: Job, test: str) -> Row:
    """One test under compute-sanitizer's memory check."""
    row: Row = {"test": f"{SANITIZER} {test.partition('::')[2]}"}
    seconds = min(LIMIT, job.deadline.left())
    if shutil.which(SANITIZER) is None:
        return row | {"skipped": f"{SANITIZER} is not installed"}
    if seconds <= 0:
        return row | {"skipped": NO_TIME}
    try:
        command = [SANITIZER, "--error-exitcode", "9", *PYTEST, test]
        status, printed = run_bounded(command, seconds=seconds, quiet=True)
    except subprocess.TimeoutExpired:
        return row | {"error": f"stopped after {seconds:.0f} s"}
    return row | ({"error": last_lines(printed)} if status else {})


def last_lines(output: str) -> str:
    return " ".join(output.split())[-LONGEST:]


if __name__ == "__main__":
    main(measure)
