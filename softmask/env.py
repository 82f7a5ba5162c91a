"""``python -m softmask.env``: installed packages, processors, and the backend of each op with the reason."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata

import torch

import softmask
from softmask import ops
from softmask.ops import _backend, _library

PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "deepspeed",
    "timm",
    "transformers",
    "open_clip_torch",
    "tokenizers",
    "webdataset",
    "numpy",
    "pillow",
)
DEVICES = ("cpu", "cuda")
# Cases in which "auto" takes no kernel because none is faster.
LEFT_TO_PYTORCH = {("soft_mask", "cpp"): "one map per image, without gradient,"}


def op_names() -> list[str]:
    return [name for name in ops.__all__ if name.islower()]


def report() -> str:
    lines = [f"softmask {softmask.__version__}", f"python {platform.python_version()} ({sys.executable})"]
    lines += [f"{name} {version(name)}" for name in PACKAGES]
    lines += ["", *_machine(), "", *_table()]
    return "\n".join(lines)


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _machine() -> Iterator[str]:
    yield f"platform: {platform.platform()}"
    yield f"CPU: {_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            memory = device.total_memory / 2**30
            yield f"CUDA device {index}: {device.name}, sm_{device.major}{device.minor}, {memory:.0f} GiB"
    else:
        yield f"CUDA: no device (torch is built for CUDA {torch.version.cuda or 'not at all'})"
    yield f"C++ extension: {_library.MISSING or 'loaded'}"
    yield f"CUDA extension: {_library.CUDA_MISSING or 'loaded'}"
    chosen = os.environ.get(_backend.ENVIRONMENT_VARIABLE)
    yield f"{_backend.ENVIRONMENT_VARIABLE}: {chosen or 'not set (auto)'}"


def _cpu_name() -> str:
    if sys.platform.startswith("linux"):
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            for line in info:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _table() -> Iterator[str]:
    named = _backend.named()
    yield "What each op takes, " + ('by "auto", and why not another:' if named == "auto" else f"{named!r} being named:")
    yield "{:<28}{:<8}{:<12}{}".format("op", "on", "backend", "why")
    for op in op_names():
        for device in DEVICES:
            backend, reason = taken(op, device) if named == "auto" else demanded(op, named, device)
            yield f"{op:<28}{device:<8}{backend:<12}{reason}"


def demanded(op: str, name: str, device: str) -> tuple[str, str]:
    """The named backend, or "none", with the reason why the op raises."""
    reason = _backend.why_not(name, device, op=op)
    return (name, "named") if reason is None else ("none", f"{name}: {reason}")


def taken(op: str, device: str) -> tuple[str, str]:
    """The backend that "auto" takes for fp32, and the reasons why those preferred to it cannot run."""
    backend = _backend.choose(device, op=op)
    left = LEFT_TO_PYTORCH.get((op, backend))
    return backend, why(op, device, backend) + (f"; {left} is left to the reference" if left else "")


def why(op: str, device: str, backend: str) -> str:
    reasons = []
    for name in _backend.preferred(device):
        if name == backend:
            break
        reasons.append(f"{name}: {_backend.why_not(name, device, op=op)}")
    return "; ".join(reasons) or "the first choice on this device"


def main(arguments: list[str] | None = None) -> int:
    """`python -m softmask.env`, `softmask env`."""
    if arguments:
        print(f"softmask env: expected no arguments, got {' '.join(arguments)}", file=sys.stderr)
        return 2
    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
