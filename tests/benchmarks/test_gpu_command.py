"""`make gpu` on a CPU at tiny sizes: every part runs, every case is a row, and a failure is a row too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu.device.jobs import Part
from benchmarks.gpu.device.ops import OPS
from benchmarks.gpu.device.record import NO_TIME, Deadline, Record

ROOT = Path(__file__).resolve().parents[2]


def rows(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of one whole run."""
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "benchmarks.gpu.device.run", "--small", "--minutes", "60", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


def test_every_case_is_a_row(folder: Path) -> None:
    assert not [row for row in rows(folder / "run.json") if "error" in row]
    for op in OPS:
        by_dtype: dict[str, list[str]] = {"bf16": [], "fp32": []}
        for row in rows(folder / f"ops_{op}.json"):
            by_dtype[row["dtype"]].append(row["run"])
            assert "skipped" in row or row["eager_us"] > 0
            assert row.get("differs", 0.0) < (0.05 if row["dtype"] == "bf16" else 1e-5)
        assert by_dtype["bf16"] == by_dtype["fp32"] and {"softmask", "reference", "floor"} <= {*by_dtype["fp32"]}
    measured = {row["what"]: row["value"] for row in rows(folder / "environment.json")}
    assert measured["copy GB/s"] > 0 and measured["matmul bf16 TFLOP/s"] > 0 and "triton" in measured
    skipped = [row for row in rows(folder / "correct.json") if "needs a CUDA device" in row["skipped"]]
    assert {row["test"].partition("[")[0] for row in skipped} >= {"test_small_case", "test_another_stream"}


@pytest.mark.parametrize("method", ["softmask_pp", "sycoca"])
def test_a_step_has_equal_losses_on_all_sides(folder: Path, method: str) -> None:
    sides = {row["side"]: row for row in rows(folder / f"step_{method}.json")}
    assert sides.keys() == {"kernels", "reference", "plain"}
    for side, row in sides.items():
        assert row["losses"] == pytest.approx(sides["plain"]["losses"], rel=0.05), side
        assert row["step_ms"] > 0 and row["parts_ms"]["image encoder"] > 0
        assert "Self CPU" in (folder / f"profile_{method}_{side}.txt").read_text(encoding="utf-8")


def test_kernels_run_in_the_interpreter(folder: Path) -> None:
    found = rows(folder / "kernels.json")
    assert len(found) == 26 and all(row["eager_us"] > 0 and row["fewest_bytes"] > 0 for row in found)


def test_page_and_size(folder: Path) -> None:
    page = (folder / "page.md").read_text(encoding="utf-8")
    for heading in ("## Tests", "## Kernels", "## Ops", "## A training step", "## Skipped"):
        assert f"\n{heading}\n" in page
    assert "## Failed" not in page
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2**20


def test_failures_are_rows(tmp_path: Path) -> None:
    record, deadline = Record(tmp_path / "rows.json"), Deadline(60.0)

    def broken() -> dict:
        raise RuntimeError("an illegal\nmemory access")

    def without_package() -> dict:
        raise ModuleNotFoundError("No module named 'peer'")

    record.case(broken, deadline=deadline, run="one")
    record.case(without_package, deadline=deadline, optional=True, run="two")
    record.case(without_package, deadline=deadline, run="three")
    record.case(dict, deadline=Deadline(0.0), run="four")
    assert rows(record.path) == [
        {"run": "one", "error": "RuntimeError: an illegal memory access"},
        {"run": "two", "skipped": "ModuleNotFoundError: No module named 'peer'"},
        {"run": "three", "error": "ModuleNotFoundError: No module named 'peer'"},
        {"run": "four", "skipped": NO_TIME},
    ]
    assert Part("ops", "unknown").run(tmp_path, seconds=60.0, size="small") == {
        "part": "ops_unknown",
        "error": "exit status 1",
    }


def test_tests_that_cannot_be_collected_are_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu.device import correct
    from benchmarks.gpu.device.jobs import Job

    monkeypatch.setattr(correct, "TESTS", "tests/kernels/no_such_file.py")
    record = Record(tmp_path / "correct.json")
    correct.measure(Job(record, Deadline(60.0), "real", ""))
    (row,) = rows(record.path)
    assert row["test"] == "all" and "no_such_file.py" in row["error"]


def test_a_part_that_takes_too_long_is_killed_with_what_it_started(tmp_path: Path) -> None:
    from benchmarks.gpu.device.jobs import run_bounded

    late = tmp_path / "late"
    with pytest.raises(subprocess.TimeoutExpired):
        run_bounded(["bash", "-c", f"(sleep 3; touch {late}) & sleep 60"], seconds=0.5)
    time.sleep(4)
    assert not late.exists()


def test_real_sizes_need_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import harness
    from benchmarks.gpu.device.run import main

    monkeypatch.setattr(harness, "DEVICE", "cpu")
    with pytest.raises(SystemExit):
        main([])
    assert "no CUDA device; --small runs tiny sizes on the CPU" in capsys.readouterr().err


def test_page_compares_measured_with_predicted(tmp_path: Path) -> None:
    """Figures made up for the test: 1 GB at 1,000 GB/s takes 1,000 microseconds."""
    from benchmarks.gpu.device.page import failures, write_page

    def write(name: str, *found: dict) -> None:
        record = Record(tmp_path / f"{name}.json")
        for row in found:
            record.add(row)

    rates = {"copy GB/s": 1000.0, "matmul bf16 TFLOP/s": 100.0}
    write("environment", *({"what": what, "value": value} for what, value in rates.items()))
    kernel = {"dtype": "bf16", "size": "N1", "eager_us": 3000.0, "device_us": 2000.0, "host_us": 70.0}
    write("kernels", {"call": "op forward", **kernel, "fewest_bytes": 1e9, "fewest_flops": 1e9})
    op = {"op": "op", "size": "N1", "dtype": "bf16", "peak_mib": 1.0}
    ours = {**op, "run": "softmask", "device_us": 100.0, "eager_us": 200.0}
    write("ops_op", ours, {**op, "run": "eager", "device_us": 300.0, "eager_us": 100.0})
    write("run", {"part": "ops_op", "error": "stopped | late"})
    write_page(tmp_path)
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| op forward | N1 | bf16 | 2e+03 | 1e+03 | 0.5 | 70 |" in page
    assert "| op | N1 | bf16 | 100 | eager | 3 | 0.5 | 1 | 1 |" in page
    assert "| run | ops_op | stopped \\| late |" in page
    assert failures(tmp_path) == [{"part": "ops_op", "error": "stopped | late"}]
