"""Kernels compiled ahead of time stay within the committed budgets (benchmarks/results/gpu_static.json)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import kernel_cases as cases
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

pytestmark = cases.needs_triton


def test_budgets_hold() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, str(BENCHMARKS / "gpu_report.py"), "--check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


ROW = {
    "registers": 100,
    "local": 0,
    "shared": 4096,
    "occupancy": 0.5,
    "load_widths": {"4": 1, "16": 2},
    "store_widths": {"16": 1},
    "async_copies": 2,
    "tensor_core": {"mma.sync": 4},
    "races": 0,
}


@pytest.mark.parametrize(
    ("worse", "said"),
    [
        ({"registers": 101}, "101 of 100 registers"),
        ({"shared": 5000}, "5000 of 4096 shared"),
        ({"local": 8}, "8 bytes of local memory"),
        ({"occupancy": 0.25}, "occupancy 0.25, not 0.5"),
        ({"load_widths": {"8": 3}}, "load_widths {'8': 3}"),
        ({"store_widths": {"4": 3}}, "store_widths {'4': 3}"),
        ({"async_copies": 0}, "0 asynchronous copies"),
        ({"tensor_core": {}}, "no mma.sync"),
        ({"races": 1}, "copies that may overtake products"),
    ],
)
def test_a_broken_budget_is_told(worse: dict, said: str) -> None:
    from gpu_report import broken

    assert broken(ROW, ROW) == []
    (line,) = broken(ROW | worse, ROW)
    assert said in line
