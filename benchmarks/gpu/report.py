"""`make gpu-report`: what can be known about the Triton kernels without a GPU.

Every kernel is compiled ahead of time for every type and architecture (static.py), and its traffic is counted in
Triton's interpreter (traffic.py). Both are printed and written to results/gpu_static.json, whose rows are budgets:
--check compiles some kernels again and fails if one needs more than the file says, or if a variant known to be near a
limit (budgets.py) exceeds it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

from benchmarks.gpu import budgets as gpu_budgets
from benchmarks.gpu.cases import CALLS, Call
from benchmarks.gpu.fast_interpreter import fast_interpreter
from softmask.kernels import INTERPRETED
from softmask.kernels._launch import Launch, hooked

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu_static.json"
PRECISIONS = {
    "fp32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "fp16": (torch.float16, "highest"),
    "bf16": (torch.bfloat16, "highest"),
}
FORBIDDEN = {"local": "bytes of local memory", "races": "copies that may overtake products"}
CHECKED = [(80, "fp32"), (90, "bf16")]  # by --check
COUNTED = {"fp32": 80, "fp16": 90}  # traffic: type -> architecture whose configurations are used


@dataclass(frozen=True)
class Gpu:
    """Peak figures of a data sheet: bytes and operations per second, dense."""

    name: str
    architecture: int
    bandwidth: float
    rates: dict[str, float]


GPUS = [
    Gpu("A100 SXM 80 GB", 80, 2.039e12, {"fp32": 19.5e12, "tf32": 156e12, "fp16": 312e12, "bf16": 312e12}),
    Gpu("H100 SXM", 90, 3.35e12, {"fp32": 66.9e12, "tf32": 494.7e12, "fp16": 989.4e12, "bf16": 989.4e12}),
]


def launches(call: Call, precision: str, architecture: int) -> list[Launch]:
    """What the call launches at its real size."""
    return launched(lambda dtype: call.run(*call.inputs(call.size, dtype, "meta")), precision, architecture)


def launched(run: Callable[[torch.dtype], object], precision: str, architecture: int) -> list[Launch]:
    """What `run(dtype)` launches, on tensors without memory."""
    dtype, matmul_precision = PRECISIONS[precision]
    before = torch.get_float32_matmul_precision()
    seen: list[Launch] = []
    torch.set_float32_matmul_precision(matmul_precision)
    try:
        with hooked(seen.append, architecture=architecture):
            run(dtype)
    finally:
        torch.set_float32_matmul_precision(before)
    return seen


def static_rows(chosen: Iterable[tuple[int, str]]) -> Iterator[dict]:
    from benchmarks.gpu.static import compile_launch

    for architecture, precision in chosen:
        for call in CALLS:
            for one in launches(call, precision, architecture):
                static = compile_launch(one, architecture)
                if precision == "tf32" and not static.dots:
                    continue  # the same as in fp32
                widths = {
                    name: {str(w): n for w, n in asdict(static)[name].items()}
                    for name in ("load_widths", "store_widths")
                }
                yield {"call": call.name, "precision": precision, **asdict(static), **widths}


def traffic_rows() -> Iterator[dict]:
    """Traffic at the small size, also as a multiple of the fewest possible bytes and operations."""
    from benchmarks.gpu.traffic import counted

    for call in CALLS:
        for precision, architecture in COUNTED.items():
            dtype = PRECISIONS[precision][0]
            inputs = call.inputs(call.small, dtype, "cpu")
            with counted(architecture) as seen:
                call.run(*inputs)
            fewest_bytes, fewest_flops = call.fewest(call.small, dtype.itemsize)
            flops = sum(one.flops for one in seen)
            yield {
                "call": call.name,
                "precision": precision,
                "size": call.small,
                "launches": len(seen),
                "bytes": sum(one.moved for one in seen),
                "bytes_over_fewest": round(sum(one.moved for one in seen) / fewest_bytes, 4),
                "flops": flops,
                "flops_over_fewest": round(flops / fewest_flops, 4) if fewest_flops else None,
            }


def floor_rows() -> Iterator[dict]:
    """Lower bounds in microseconds at the real size, by the data sheets."""
    for call in CALLS:
        for precision, (dtype, _) in PRECISIONS.items():
            moved, flops = call.fewest(call.size, dtype.itemsize)
            times = {gpu.name: max(moved / gpu.bandwidth, flops / gpu.rates[precision]) * 1e6 for gpu in GPUS}
            yield {
                "call": call.name,
                "precision": precision,
                "size": call.size,
                "limit": "bytes" if moved / GPUS[0].bandwidth >= flops / GPUS[0].rates[precision] else "products",
                "floor_us": {name: round(time, 1) for name, time in times.items()},
            }


def broken(row: dict, budget: dict) -> list[str]:
    """How a compiled kernel exceeds its budget."""
    found = [f"{row[name]} {what}" for name, what in FORBIDDEN.items() if row[name]]
    for name in ("registers", "shared", "instructions", "loop"):
        if row[name] > budget[name]:
            found.append(f"{row[name]} of {budget[name]} {name}")
    if row["occupancy"] < budget["occupancy"]:
        found.append(f"occupancy {row['occupancy']}, not {budget['occupancy']}")
    for name in ("load_widths", "store_widths"):
        if max(map(int, row[name]), default=0) < max(map(int, budget[name]), default=0):
            found.append(f"{name} {row[name]}, not {budget[name]}")
    if row["async_copies"] < budget["async_copies"]:
        found.append(f"{row['async_copies']} asynchronous copies, not {budget['async_copies']}")
    found += [f"no {name}" for name in budget["tensor_core"] if name not in row["tensor_core"]]
    return found


def check(precision: str) -> list[str]:
    """One line per exceeded budget, for one precision or for all that are checked."""
    committed = json.loads(RESULTS.read_text())
    if committed["triton"] != triton.__version__:
        return [f"budgets are of Triton {committed['triton']}, this is {triton.__version__}: run make gpu-report"]
    budgets = {_key(row): row for row in committed["static"]}
    lines = gpu_budgets.check()
    for row in static_rows([one for one in CHECKED if precision in ("all", one[1])]):
        what = broken(row, budgets[_key(row)]) if _key(row) in budgets else ["no committed budget"]
        lines += [f"{row['call']} {row['kernel']} {row['precision']} sm_{row['architecture']}: {one}" for one in what]
    return lines


def _key(row: dict) -> tuple:
    return row["call"], row["kernel"], row["precision"], row["architecture"]


def report() -> None:
    from benchmarks.gpu.static import ARCHITECTURES

    static = list(static_rows((architecture, name) for architecture in ARCHITECTURES for name in PRECISIONS))
    command = [sys.executable, "-m", "benchmarks.gpu.report", "--traffic"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    results = {
        "triton": triton.__version__,
        "static": static,
        "traffic": json.loads(done.stdout),
        "floor": list(floor_rows()),
    }
    RESULTS.write_text(_json(results))
    print("\n".join(_tables(results)))


def _json(results: dict) -> str:
    """One row per line, so that a change of one kernel changes only its lines."""
    parts = [f'"triton": {json.dumps(results["triton"])}']
    for name in ("static", "traffic", "floor"):
        parts.append(f'"{name}": [\n' + ",\n".join(json.dumps(row) for row in results[name]) + "\n]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _tables(results: dict) -> Iterator[str]:
    head = f"{'kernel':<58}{'type':<6}{'sm':>4}{'regs':>6}{'local':>6}{'shared':>8}{'instr.':>7}{'loop':>6}{'occ.':>6}"
    yield f"{head}  widest load/store, tensor cores"
    for row in results["static"]:
        widths = "/".join(str(max(map(int, row[name]), default=0)) for name in ("load_widths", "store_widths"))
        cores = " ".join(f"{name} {count}" for name, count in row["tensor_core"].items())
        copies = f" cp.async {row['async_copies']}" if row["async_copies"] else ""
        label = f"{row['call']}: {row['kernel'].lstrip('_')}"
        yield (
            f"{label:<58}{row['precision']:<6}{row['architecture']:>4}{row['registers']:>6}{row['local']:>6}"
            f"{row['shared']:>8}{row['instructions']:>7}{row['loop']:>6}{row['occupancy']:>6.2f}"
            f"  {widths} B{copies} {cores}"
        )
    yield f"\n{'traffic, by the interpreter':<40}{'type':<6}{'launches':>9}{'bytes x fewest':>16}{'flops x fewest':>16}"
    for row in results["traffic"]:
        flops = "" if row["flops_over_fewest"] is None else f"{row['flops_over_fewest']:.3f}"
        yield f"{row['call']:<40}{row['precision']:<6}{row['launches']:>9}{row['bytes_over_fewest']:>16.3f}{flops:>16}"
    names = [gpu.name for gpu in GPUS]
    yield f"\n{'floor at the real size, by data sheets':<40}{'type':<6}{'limit':>10}" + "".join(
        f"{n + ', us':>22}" for n in names
    )
    for row in results["floor"]:
        times = "".join(f"{row['floor_us'][name]:>22.1f}" for name in names)
        yield f"{row['call']:<40}{row['precision']:<6}{row['limit']:>10}{times}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", nargs="?", const="all", choices=("all", "fp32", "bf16"), help="compare with the committed budgets"
    )
    parser.add_argument("--traffic", action="store_true", help="print the counted traffic as JSON")
    chosen = parser.parse_args()
    if chosen.traffic != INTERPRETED:
        sys.exit("TRITON_INTERPRET=1 is for --traffic alone: the interpreter compiles nothing")
    if chosen.traffic:
        with fast_interpreter():
            print(json.dumps(list(traffic_rows())))
    elif chosen.check:
        sys.exit("\n".join(check(chosen.check)) or None)
    else:
        report()


if __name__ == "__main__":
    main()
