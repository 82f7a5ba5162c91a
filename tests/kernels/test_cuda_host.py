"""What the emulation of a GPU on the host finds in CUDA C++ kernels, and every backend's contract for ops on it."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from softmask.ops import _library
from tests.kernels import test_kernel_contract as contract
from tests.support import cuda_host
from tests.support.cuda_host import CSRC, ORDERS, HostError, Kernels, backend_on_host, call

pytestmark = cuda_host.needs_compiler
PROBE = """
#include "CSRC/host/interface.h"

using namespace softmask::cuda;

__global__ void reverse(int* out, bool waits) {
  float* memory = shared_memory();
  memory[threadIdx.x] = threadIdx.x;
  if (waits) __syncthreads();
  const float value = memory[blockDim.x - 1 - threadIdx.x];
  out[threadIdx.x] = value == value ? static_cast<int>(value) : -1;
}
__global__ void leave_barrier(unsigned thread) {
  if (threadIdx.x == thread) return;
  __syncthreads();
}
__global__ void leave_shuffle(unsigned lane) {
  if (threadIdx.x % 32 != lane) warp_sum(1.0f);
}
__global__ void split_barrier() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void sum_lanes(int* out) { out[threadIdx.x] = static_cast<int>(warp_sum(threadIdx.x)); }

SOFTMASK_EXPORT const char* run_reverse(int* out, bool waits, unsigned threads, unsigned bytes) {
  return host::error_of([=] { launch(reverse, 1, 1, threads, bytes, {}, out, waits); });
}
SOFTMASK_EXPORT const char* run_leave_barrier(unsigned thread) {
  return host::error_of([=] { launch(leave_barrier, 1, 1, 64, 0, {}, thread); });
}
SOFTMASK_EXPORT const char* run_leave_shuffle(unsigned lane) {
  return host::error_of([=] { launch(leave_shuffle, 1, 1, 64, 0, {}, lane); });
}
SOFTMASK_EXPORT const char* run_split_barrier() {
  return host::error_of([=] { launch(split_barrier, 1, 1, 64, 0, {}); });
}
SOFTMASK_EXPORT const char* run_sum_lanes(int* out, int64_t blocks) {
  return host::error_of([=] { launch(sum_lanes, blocks, 1, 64, 0, {}, out); });
}
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder: Path = tmp_path_factory.mktemp("probe")
    (folder / "probe.cpp").write_text(PROBE.replace("CSRC", str(CSRC)))
    return cuda_host.compiled(folder, "probe.cpp")


@pytest.mark.parametrize("order", ORDERS)
def test_forgotten_barrier_changes_values(probe: ctypes.CDLL, order: str) -> None:
    """Shared memory that no thread has written yet is NaN."""
    out = (ctypes.c_int * 64)()
    call(probe, "run_reverse", out, True, 64, 256, order=order)
    assert list(out) == list(range(63, -1, -1))
    call(probe, "run_reverse", out, False, 64, 256, order=order)
    assert -1 in out


@pytest.mark.parametrize("order", ORDERS)
def test_shuffles_exchange_values_of_lanes(probe: ctypes.CDLL, order: str) -> None:
    out = (ctypes.c_int * 64)()
    call(probe, "run_sum_lanes", out, ctypes.c_int64(1), order=order)
    assert list(out) == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("run_leave_barrier", [5], r"block 0: thread \d+ waits at the barrier in probe.cpp:15, which thread 5 never"),
        ("run_leave_shuffle", [8], "thread 0 waits at the shuffle in device.h:.*, which thread 8 never reaches"),
        ("run_split_barrier", [], "barrier in probe.cpp:22, which thread 32 does not reach: it waits .*probe.cpp:24"),
        ("run_reverse", [None, True, 48, 256], "a GPU refuses this launch: 1 layers, 48 threads"),
        ("run_reverse", [None, True, 64, 50_000], "a GPU refuses this launch: .* 50000 bytes of shared memory"),
        ("run_sum_lanes", [None, ctypes.c_int64(2**31)], "at most 2147483647 blocks .* need 2147483648; split"),
    ],
)
def test_refused(probe: ctypes.CDLL, function: str, arguments: list, message: str, order: str) -> None:
    with pytest.raises(HostError, match=message):
        call(probe, function, *arguments, order=order)


@pytest.mark.parametrize("op", ["soft_mask", "word_attention"])
def test_autocast_second_derivative_and_compile(op: str) -> None:
    assert op in _library.CUDA_OPS
    with backend_on_host(Kernels(op)):
        contract.test_autocast_changes_nothing(op, torch.bfloat16, "cuda")
        contract.test_second_derivative_raises(op, "cuda")
        contract.test_compiles_to_one_graph(op, "aot_eager", "cuda")
