"""One line for errors of libraries that are caused by the machine: memory, network, other ranks."""

from __future__ import annotations

import re

import torch
import torch.distributed as dist

NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory")
LOST_RANK = ("connection closed by peer", "connection reset by peer", "connection refused", "broken pipe")
NETWORK = (dist.DistNetworkError, dist.DistStoreError)


def explain(error: BaseException, *, smaller: str) -> str | None:
    """The line, or None for other errors. `smaller` says how to use less memory."""
    text = " ".join(str(error).split())
    lower = text.lower()
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(part in lower for part in NO_MEMORY):
        return f"out of memory: {smaller} ({_head(text) or type(error).__name__})"
    if not isinstance(error, RuntimeError):
        return None
    if "unable to find address for" in lower or "no socket interface found" in lower:
        return f"GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME: this machine has no such network interface ({_head(text)})"
    if "dataloader worker" in lower:
        return f"data.workers: a worker died, usually for lack of memory or /dev/shm: use fewer ({_head(text)})"
    if isinstance(error, NETWORK) and "eaddrinuse" in lower:
        port = re.search(r"port: (\d+)", text)
        taken = f"port {port.group(1)}" if port else "the port"
        return f"MASTER_PORT: {taken} is taken on this machine, choose another (--master_port of the launcher)"
    if isinstance(error, NETWORK):
        return f"MASTER_ADDR, MASTER_PORT: cannot reach rank 0 there; is it running? ({_head(text)})"
    if isinstance(error, dist.DistBackendError) or any(part in lower for part in LOST_RANK):
        return f"lost the connection to another rank; the rank that ended first says why ({_head(text)})"
    return None


def _head(text: str) -> str:
    """The start of a message, without source locations and stack."""
    start = re.split(r"\bException raised from\b|\bOriginal Traceback\b|This is typically caused", text)[0]
    return re.sub(r"^\[[^\]]*\.(cc|cpp):\d+\] (err == 0\. )?", "", start)[:200].strip()
