"""Times of a call on a GPU: the device's, from replays of a CUDA graph with a flushed cache, and the host's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks import harness
from benchmarks.gpu.device.record import Row, describe

REPLAYS, TURNS, WARM_UPS = 30, 20, 3
FLUSHED = 256 * 2**20  # bytes, several times the largest cache
Call = Callable[[], object]


def times(call: Call) -> Row:
    """Microseconds, medians: `device_us` of a replayed graph, `host_us` until an eager call returns, `eager_us` until
    its result is there. On the CPU only the last."""
    call()
    row: Row = {}
    if harness.DEVICE == "cuda":
        try:
            row["device_us"] = device_microseconds(captured(call))
        except Exception as error:
            row["graph_error"] = describe(error)
            torch.cuda.synchronize()
    host, eager = [], []
    for _ in range(TURNS if harness.DEVICE == "cuda" else 2):
        harness.synchronize()
        start = time.perf_counter()
        result = call()
        host.append(time.perf_counter() - start)
        harness.synchronize()
        eager.append(time.perf_counter() - start)
        del result
    if harness.DEVICE == "cuda":
        row["host_us"] = 1e6 * statistics.median(host)
    row["eager_us"] = 1e6 * statistics.median(eager)
    return row


def captured(call: Call) -> Call:
    """The call as a CUDA graph; what it returns is the graph's memory.

    Raises:
        RuntimeError: the call waits for the device, or launches what cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> object:
        graph.replay()
        return result

    return replay


def device_microseconds(call: Call, replays: int = REPLAYS) -> float:
    """The median time between events around the call, each after the cache was overwritten."""
    flush = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays)]
    for begin, end in pairs:
        flush.zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(begin.elapsed_time(end) for begin, end in pairs)
