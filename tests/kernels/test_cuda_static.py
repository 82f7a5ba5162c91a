"""The CUDA C++ kernels, compiled by nvcc, spill no registers and stay within benchmarks/results/gpu_cuda.json."""

from __future__ import annotations

import json

import pytest

from benchmarks.gpu import cuda

needs_nvcc = pytest.mark.skipif(cuda.nvcc_version() is None, reason="needs nvcc")


@needs_nvcc
@pytest.mark.parametrize("architecture", [80, *(pytest.param(one, marks=pytest.mark.slow) for one in (90, 100))])
def test_budgets_hold(architecture: int) -> None:
    assert cuda.check(architecture) == []


def test_every_kernel_is_recorded_without_spills_and_with_wide_accesses() -> None:
    rows = json.loads(cuda.RESULTS.read_text())["rows"]
    by_architecture = {
        architecture: {f"{row['file']} {row['kernel']}" for row in rows if row["architecture"] == architecture}
        for architecture in cuda.ARCHITECTURES
    }
    assert len(by_architecture[80]) == 47 and len({frozenset(names) for names in by_architecture.values()}) == 1
    assert not any(row["spilled"] for row in rows)
    for row in rows:
        vectors = "<fp32, 4" in row["kernel"] or "16, 8" in row["kernel"]
        assert not vectors or row["wide_loads"], row


@pytest.mark.parametrize(
    ("worse", "message"),
    [
        ({"spilled": 8}, "8 bytes of spilled registers"),
        ({"registers": 33}, "33 of 32 registers"),
        ({"wide_loads": 1}, "1 of 2 wide loads"),
        ({"wide_stores": 0}, "0 of 1 wide stores"),
        ({"kernel": "another_kernel"}, "not in gpu_cuda.json"),
    ],
)
def test_budget_names_what_became_worse(
    worse: dict, message: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"file": "x.cu", "kernel": "one_kernel", "architecture": 80, "registers": 32, "spilled": 0}
    row |= {"wide_loads": 2, "wide_stores": 1}
    results = tmp_path_factory.mktemp("results") / "gpu_cuda.json"
    results.write_text(json.dumps({"nvcc": "13.0", "rows": [row]}))
    monkeypatch.setattr(cuda, "RESULTS", results)
    monkeypatch.setattr(cuda, "nvcc_version", lambda: "13.0")
    monkeypatch.setattr(cuda, "rows", lambda _: [row])
    assert cuda.check(80) == []
    monkeypatch.setattr(cuda, "rows", lambda _: [row | worse])
    (line,) = cuda.check(80)
    assert message in line
