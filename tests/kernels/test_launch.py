"""What a launch depends on: the configuration of the architecture, torch's precision settings, tuning."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from softmask import kernels
from tests.support import kernel_cases as cases

pytestmark = cases.needs_triton
TABLE = {0: {"BLOCK": 256}, 80: {"BLOCK": 32}, 86: {"BLOCK": 16}, 90: {"BLOCK": 64}}


@pytest.fixture
def launcher():
    from softmask.kernels import _launch

    return _launch


@pytest.mark.parametrize(
    ("architecture", "block"), [(80, 32), (86, 16), (89, 16), (90, 64), (100, 64), (103, 64), (120, 16)]
)
def test_config_of_the_nearest_architecture_below(launcher, architecture: int, block: int) -> None:
    """Among those of its kind: 120 has the shared memory of 86, not of 90."""
    with launcher.hooked(lambda one: None, architecture=architecture):
        assert launcher.config(TABLE, torch.ones(1)) == {"BLOCK": block}
    assert launcher.config(TABLE, torch.ones(1)) == {"BLOCK": 256 if launcher.INTERPRETED else 32}


def test_gpus_with_less_shared_memory_fall_back_to_the_row_of_80(launcher) -> None:
    table = {80: {"BLOCK": 32}, 90: {"BLOCK": 64}, 100: {"BLOCK": 128}}
    for architecture, block in ((86, 32), (120, 32), (110, 128)):
        with launcher.hooked(lambda one: None, architecture=architecture):
            assert launcher.config(table, torch.ones(1)) == {"BLOCK": block}


class Kernel:
    """The attributes of a kernel that a launch reads."""

    def __init__(self, *names: str) -> None:
        self.arg_names = list(names)


def test_launches_reach_the_hook_unless_empty(launcher) -> None:
    seen = []
    one = torch.ones(1)
    with launcher.hooked(seen.append):
        launcher.launch(Kernel("x", "size", "BLOCK"), (3,), one, 5, BLOCK=16, num_warps=8)
        launcher.launch(Kernel("x", "size", "BLOCK"), (0,), one, 5, BLOCK=16)
    (launch,) = seen
    with pytest.raises(ValueError):
        assert launch._replace(kernel=Kernel("x")).arguments
    assert launch.arguments == {"x": one, "size": 5, "BLOCK": 16}
    assert (launch.grid, launch.num_warps, launch.device) == ((3,), 8, one.device)


def test_tuning_keeps_the_fastest_launch(launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch is tuned once for arguments of one shape, and again for another shape."""
    tried = []

    def milliseconds(launch) -> float:
        tried.append(launch.num_warps)
        return {2: 3.0, 4: 2.0, 8: 1.0}[launch.num_warps]

    monkeypatch.setattr(launcher, "_milliseconds", milliseconds)
    monkeypatch.setattr(launcher, "_tuned", {})
    some = Kernel("x", "factor")
    for factor in (0.5, 0.7):
        chosen = launcher.tune(launcher.Launch(some, (1,), (), {"x": torch.ones(3), "factor": factor}, 4, 3, 128))
        assert (chosen.num_warps, chosen.num_stages) == (8, 3)
        assert chosen.maxnreg is None, "128 registers were for 4 warps"
    assert tried == [2, 4, 8]
    launcher.tune(launcher.Launch(some, (1,), (), {"x": torch.ones(4), "factor": 0.5}, 4, 3))
    assert len(tried) == 6


@pytest.mark.parametrize("updates", [False, True])
def test_launch_that_updates_its_inputs_is_not_tuned(launcher, monkeypatch: pytest.MonkeyPatch, updates: bool) -> None:
    tuned, ran = [], []
    monkeypatch.setattr(launcher, "AUTOTUNE", True)
    monkeypatch.setattr(launcher, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(launcher, "tune", lambda one: tuned.append(one) or one)
    monkeypatch.setattr(launcher.Launch, "run", lambda one: ran.append(one))
    launcher.launch(Kernel("x"), (1,), torch.ones(1), updates=updates)
    assert len(ran) == 1 and len(tuned) == (not updates)


@pytest.mark.parametrize("setting", ["highest", "high", "new"])
def test_tf32_only_where_torch_allows_it(launcher, setting: str) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        if setting == "new":
            matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision(setting)
        assert launcher.dots(torch.ones(1))["PRECISION"] == ("ieee" if setting == "highest" else "tf32")
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


def test_products_use_the_common_type(launcher) -> None:
    import triton.language as tl

    half, bf16, single = (torch.ones(1, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32))
    assert launcher.dots(half, half)["DOT"] == tl.float16
    assert launcher.dots(half, bf16)["DOT"] == launcher.dots(half, single)["DOT"] == tl.float32
    assert launcher.dots(bf16)["DOT"] == (tl.float32 if launcher.INTERPRETED else tl.bfloat16)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current one is of compute capability 9.0, the other one of 7.5."""
    majors = {0: 9, 1: 7}
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device=None: SimpleNamespace(major=majors[torch.device(device).index or 0]),
    )


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 0), torch.device("cuda")])
def test_kernels_run_on_the_device_of_the_tensors(two_gpus, device: torch.device | str) -> None:
    assert kernels.why_not(device, torch.float32) is None


@pytest.mark.parametrize("device", ["cuda:1", torch.device("cuda", 1)])
def test_old_gpu_beside_a_current_one_is_refused(two_gpus, device: torch.device | str) -> None:
    assert "compute capability 8.0 or later, this one has 7.x" in kernels.why_not(device, torch.float32)


@pytest.mark.parametrize(
    ("version", "runs"),
    [("3.2.0", False), ("2.3.1", False), ("3.3.0", True), ("3.10.1+git1a2b", True), ("4.0.0", True), (None, True)],
)
def test_triton_before_3_3_is_refused(version: str | None, runs: bool) -> None:
    reason = kernels.why_not_triton(version)
    assert reason is None if runs else f"Triton {version} cannot compile" in reason and "3.3" in reason


def test_env_reports_a_triton_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    from softmask import env

    monkeypatch.setattr(kernels, "_TOO_OLD", kernels.why_not_triton("3.2.0"))
    backend, reason = env.taken("soft_mask", "cuda")
    assert backend == "reference" and "triton: Triton 3.2.0 cannot compile" in reason
