"""Kernels compiled ahead of time stay within the committed budgets (benchmarks/results/gpu_static.json)."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.version import Version

from softmask import kernels
from tests.support import kernel_cases as cases

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted(Path(kernels.__file__).parent.glob("*.py"))

pytestmark = cases.needs_triton


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_budgets_hold(precision: str) -> None:
    committed = json.loads((ROOT / "benchmarks" / "results" / "gpu_static.json").read_text())["triton"]
    installed = kernels.triton_version()
    if installed is not None and Version(installed) < Version(committed):
        pytest.skip(f"budgets are of Triton {committed}: {installed}, which is older, gives other machine code")
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "benchmarks.gpu.report", "--check", precision]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


ROW = {
    "registers": 100,
    "local": 0,
    "shared": 4096,
    "instructions": 900,
    "loop": 500,
    "occupancy": 0.5,
    "load_widths": {"4": 1, "16": 2},
    "store_widths": {"16": 1},
    "async_copies": 2,
    "tensor_core": {"mma.sync": 4},
    "races": 0,
}


@pytest.mark.parametrize(
    ("worse", "message"),
    [
        ({"registers": 101}, "101 of 100 registers"),
        ({"shared": 5000}, "5000 of 4096 shared"),
        ({"instructions": 901}, "901 of 900 instructions"),
        ({"loop": 510}, "510 of 500 loop"),
        ({"local": 8}, "8 bytes of local memory"),
        ({"occupancy": 0.25}, "occupancy 0.25, not 0.5"),
        ({"load_widths": {"8": 3}}, "load_widths {'8': 3}"),
        ({"store_widths": {"4": 3}}, "store_widths {'4': 3}"),
        ({"async_copies": 0}, "0 asynchronous copies"),
        ({"tensor_core": {}}, "no mma.sync"),
        ({"races": 1}, "copies that may overtake products"),
    ],
)
def test_exceeded_budget_is_reported(worse: dict, message: str) -> None:
    from benchmarks.gpu.report import broken

    assert broken(ROW, ROW) == []
    (line,) = broken(ROW | worse, ROW)
    assert message in line


def test_committed_variants_stay_within_the_limits() -> None:
    from benchmarks.gpu.budgets import committed, lines_of

    assert committed() and list(lines_of(committed())) == []


def test_variant_beyond_a_limit_is_reported() -> None:
    """The limit is the smallest shared memory of the architectures that share a launch."""
    from benchmarks.gpu.budgets import lines_of

    within = {"some forward kernel: as usual": {"bf16": {"80 86": [255, 99 << 10], "90": [168, 227 << 10]}}}
    assert list(lines_of(within)) == []
    (line,) = lines_of({"some": {"bf16": {"80 86": [255, (99 << 10) + 1]}}})
    assert "sm_80/86: 101377 of 101376 bytes of shared memory" in line
    (line,) = lines_of({"some": {"fp32": {"80": [255, 0, 16]}}})
    assert "16 bytes of local memory" in line


def test_triton_version_matrix_is_complete() -> None:
    """It has every release, the newest with every call; releases from OLDEST_TRITON on compile, earlier ones fail."""
    from benchmarks.gpu.cases import CALLS
    from benchmarks.gpu.matrix import PAIRS, RESULTS

    rows = json.loads(RESULTS.read_text())
    assert list(rows) == list(PAIRS)
    assert set(rows[list(PAIRS)[-1]]["calls"]) == {call.name for call in CALLS}, "make gpu-matrix"
    for version, row in rows.items():
        assert set(row["calls"]) <= {call.name for call in CALLS}
        errors = [error for call in row["calls"].values() for error in call["errors"]]
        assert bool(errors) == (kernels.why_not_triton(version) is not None), (version, errors)


def jitted(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(one) for one in node.decorator_list):
            yield node


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _tests_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Compare) and _is_none(node.comparators[0])


# Of triton.language in 3.8, and not in 3.3.
NEWER = {
    "aggregate_replace", "bitonic_merge", "condition", "load_tensor_descriptor", "make_tensor_descriptor",
    "map_elementwise", "mul", "reduce_or", "squeeze", "store_tensor_descriptor", "sub", "target_info",
    "tensor_descriptor", "to_tensor", "topk", "unsqueeze",
}  # fmt: skip


def refused_by_old_tritons(function: ast.FunctionDef) -> Iterator[str]:
    """Patterns that Triton 3.3 to 3.6 cannot compile but the current release can."""
    nodes = list(ast.walk(function))
    optional = {node.left.id for node in nodes if _tests_none(node) and isinstance(node.left, ast.Name)}
    indices = {node.slice for node in nodes if isinstance(node, ast.Subscript)}  # x[:, None]
    for node in nodes:
        if isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Load) and node not in indices:
            names = {one.id for one in node.elts if isinstance(one, ast.Name)}
            if names & optional or any(map(_is_none, node.elts)):
                yield f"line {node.lineno}: a tuple that may hold None"
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "tl" and node.attr in NEWER:
            yield f"line {node.lineno}: tl.{node.attr} is newer"
        if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And) and any(map(_tests_none, node.values)):
            yield f"line {node.lineno}: a test for None beside another condition"
    for node in function.body[:-1]:
        if isinstance(node, ast.If) and any(isinstance(one, ast.Return) for one in node.body):
            yield f"line {node.lineno}: a return before the end"


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_avoid_patterns_that_old_tritons_refuse(path: Path) -> None:
    found = [
        f"{path.name} {function.name} {what}"
        for function in jitted(ast.parse(path.read_text()))
        for what in refused_by_old_tritons(function)
    ]
    assert not found


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return a, None", "may hold None"),
        ("if b is not None:\n  b += 1\n return a, b", "may hold None"),
        ("x = helper((a, b))\n if b is None:\n  x += 1\n return x", "may hold None"),
        ("if b is not None and a > 0:\n  a += b\n return a", "beside another condition"),
        ("if a.shape[0] == 1:\n  return a\n return b", "before the end"),
        ("return tl.to_tensor(a) + b", "tl.to_tensor is newer"),
        ("if b is not None:\n  a += b\n return a", None),
    ],
)
def test_patterns_that_old_tritons_refuse_are_detected(body: str, message: str | None) -> None:
    (function,) = ast.parse(f"def helper(a, b):\n {body}").body
    found = list(refused_by_old_tritons(function))
    assert (found == []) if message is None else message in found[0]
