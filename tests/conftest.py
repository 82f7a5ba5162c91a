"""Session setup: one thread per worker, CPU settings where there is no GPU, caches apart from the user's."""

from __future__ import annotations

import getpass
import hashlib
import os
import tempfile
from pathlib import Path

import pytest

FUSED = Path(__file__).resolve().parents[1] / "softmask" / "ops" / "_fused"


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before torch is imported; the subprocesses that tests start inherit it."""
    in_worker = "PYTEST_XDIST_WORKER" in os.environ
    os.environ.setdefault("OMP_NUM_THREADS", "1" if in_worker else str(min(4, os.cpu_count() or 1)))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _isolate_cache(config)

    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("TRITON_INTERPRET", "1")


def _isolate_cache(config: pytest.Config) -> None:
    folder = tempfile.TemporaryDirectory(prefix="softmask-cache-", ignore_cleanup_errors=True)
    config.add_cleanup(folder.cleanup)
    os.environ["XDG_CACHE_HOME"] = folder.name
    # Inductor's cache key leaves out the instruction set (sums are wrong then, torch 2.14) and the ops' fakes.
    instructions = os.environ.get("ATEN_CPU_CAPABILITY") or "native"
    fakes = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(FUSED.glob("*.py")))).hexdigest()[:12]
    compiled = Path(tempfile.gettempdir()) / f"softmask-inductor-{getpass.getuser()}-{instructions}-{fakes}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Trainings take longest. In several processes short tests then fill the end of a run.
    items.sort(key=lambda item: "training" not in item.path.parts)
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def fast_interpreter():
    from softmask import kernels

    if not kernels.INSTALLED:
        yield
        return
    from benchmarks.gpu.fast_interpreter import fast_interpreter

    with fast_interpreter():
        yield


@pytest.fixture
def plain_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore torch's linear after the test: ZeRO 3 replaces it for good by one that rounds differently."""
    from torch.nn import functional

    monkeypatch.setattr(functional, "linear", functional.linear)


@pytest.fixture
def poisoned_memory():
    """Fill torch.empty with NaN, so that an element a kernel does not write shows."""
    import torch

    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["reference", "cpp"])
def each_backend(request: pytest.FixtureRequest):
    """Run the test with each backend for CPU tensors."""
    import softmask
    from softmask.ops import _library

    if request.param == "cpp" and _library.MISSING is not None:
        pytest.skip(f"make env builds it: {_library.MISSING}")
    with softmask.backend(request.param):
        yield request.param
