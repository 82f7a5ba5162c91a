"""The report of `python -m softmask.env`."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import softmask
from softmask import cli, env, ops
from softmask.ops import _backend, _library
from tests.support.kernel_cases import needs_cpp

OPS = [name for name in ops.__all__ if name.islower()]


def test_command_prints_versions_and_devices() -> None:
    done = subprocess.run([sys.executable, "-m", "softmask.env"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"softmask {softmask.__version__}\npython {platform.python_version()}")
    assert f"\ntorch {torch.__version__.split('+')[0]}" in done.stdout
    for expected in ("deepspeed", "timm", "CPU: ", "CUDA", "C++ extension: ", "SOFTMASK_BACKEND: "):
        assert expected in done.stdout


def test_table_says_what_auto_takes() -> None:
    rows = [re.split(r"\s{2,}", line) for line in env.report().splitlines()]
    for op in OPS:
        for device in env.DEVICES:
            (row,) = [row for row in rows if row[:2] == [op, device]]
            assert row[2] == _backend.choose(device, op=op)
    (row,) = [row for row in rows if row[:2] == ["word_attention", "cuda"]]
    assert row[2:] == ["triton", "the first choice on this device"]


def test_table_says_what_a_named_backend_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "CUDA_MISSING", "not built here")
    with softmask.backend("reference"):
        report = env.report()
    assert re.search(r"^word_attention +cpu +reference +named$", report, re.MULTILINE)
    with softmask.backend("cuda"):
        report = env.report()
    assert "What each op takes, 'cuda' being named:" in report
    assert "CUDA extension: not built here" in report
    assert re.search(r"^soft_mask +cuda +none +cuda: not built here$", report, re.MULTILINE)
    assert re.search(
        r"^attentive_mask +cuda +none +cuda: only .*soft_mask.* have CUDA C\+\+ kernels$", report, re.MULTILINE
    )


@needs_cpp
def test_table_says_what_auto_leaves_to_pytorch() -> None:
    (row,) = re.findall(r"^soft_mask +cpu .*$", env.report(), re.MULTILINE)
    assert row.endswith("one map per image, without gradient, is left to the reference")


def test_table_gives_the_reason_of_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "MISSING", "not built here")
    report = env.report()
    assert "C++ extension: not built here" in report
    assert re.search(r"^soft_mask +cpu +reference +cpp: not built here$", report, re.MULTILINE)
    monkeypatch.setattr(_library, "MISSING", None)
    assert re.search(r"^word_attention +cpu +cpp +the first choice on this device$", env.report(), re.MULTILINE)


def test_missing_packages_and_environment_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setenv("SOFTMASK_BACKEND", "reference")
    report = env.report()
    assert "no-such-package not installed" in report and "SOFTMASK_BACKEND: reference" in report


@pytest.mark.parametrize(
    ("named", "spins"), [({}, cli.SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)]
)
def test_commands_limit_how_long_idle_threads_spin(
    named: dict[str, str], spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that the test's end restores it
        monkeypatch.delenv(name)
    for name, value in named.items():
        monkeypatch.setenv(name, value)
    seen: list[object] = []
    monkeypatch.setattr(
        cli.importlib,
        "import_module",
        lambda _: SimpleNamespace(main=lambda given: seen.append((os.environ.get("GOMP_SPINCOUNT"), given))),
    )
    cli.run("env", ["--help"])
    assert seen == [(spins, ["--help"])]
