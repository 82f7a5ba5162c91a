"""Limits that every variant of every kernel must keep: no spilled registers, and a block's shared memory.

`python -m benchmarks.gpu.budgets` compiles the variants (variants.py) and writes results/gpu_variants.json, one line
per variant: {type: {architectures: [registers, bytes of shared memory]}}, with a third number if registers are spilled.
A pattern, such as word_attention, updates the lines that it matches and leaves the others. sm_86, sm_89 and sm_120 run
the instructions of sm_80: if the tables give them the same launch, it is compiled once, for the first of them, and
compared with the memory of all.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import triton

RESULTS = Path(__file__).parents[1] / "results" / "gpu_variants.json"
FAMILIES = ((80, 86, 89, 120), (90,), (100,))  # each with one kind of tensor cores
TYPES = ("bf16", "fp32")
# Variants that once exceeded a limit, by name.
NEAR_LIMITS = (
    "word_attention backward bwd_keys_kernel: bias=True padding=True P=257 subtokens=3",
    "focal_contrastive_loss backward bwd_kernel: D=32 ids=True",
    "focal_contrastive_loss backward bwd_kernel: D=257 N=4096",
    "focal_contrastive_loss backward bwd_kernel: D=257 ids=True",
    "attentive_mask forward fwd_score_kernel: T=130 padding=True",
)


def lines_of(rows: dict[str, dict]) -> Iterator[str]:
    """One line per exceeded limit, for rows as in the file."""
    from benchmarks.gpu.static import most_shared

    for name, by_type in rows.items():
        for precision, by_architecture in by_type.items():
            for architectures, (registers, shared, *local) in by_architecture.items():
                label = f"{name}, {precision}, sm_{architectures.replace(' ', '/')}"
                if local:
                    yield f"{label}: {local[0]} bytes of local memory at {registers} registers"
                least = min(most_shared(int(one)) for one in architectures.split())
                if shared > least:
                    yield f"{label}: {shared} of {least} bytes of shared memory"


def compiled_rows(pattern: str, types: tuple[str, ...], families: tuple[tuple[int, ...], ...]) -> Iterator[tuple]:
    """(name, type, architectures, numbers) of the variants whose name matches the pattern."""
    from benchmarks.gpu.static import compile_launch

    for precision in types:
        for family in families:
            for name, one, architectures in _once(precision, family):
                if not re.search(pattern, name) or (family[0] > 80 and "PRECISION" not in one.arguments):
                    continue  # a kernel without products has the same code everywhere
                static = compile_launch(one, architectures[0])
                numbers = [static.registers, static.shared, *[static.local][: static.local > 0]]
                yield name, precision, " ".join(map(str, architectures)), numbers


def _once(precision: str, family: tuple[int, ...]) -> list[tuple[str, object, list[int]]]:
    """Each distinct launch within a family: (name, launch, architectures)."""
    from benchmarks.gpu.compile import specialization
    from benchmarks.gpu.variants import variant_launches

    met: dict[tuple, tuple] = {}
    for architecture in family:
        for variant, one in variant_launches(precision, architecture):
            name = f"{variant.name} {one.kernel.__name__.lstrip('_')}: {variant.label}"
            met.setdefault(specialization(one), (name, one, []))[2].append(architecture)
    return list(met.values())


def check() -> list[str]:
    """One line per limit that the variants near the limits, compiled again, exceed."""
    pattern = "|".join(f"^{re.escape(name)}$" for name in NEAR_LIMITS)
    rows = {
        name: {precision: {on: numbers}}
        for name, precision, on, numbers in compiled_rows(pattern, TYPES[:1], FAMILIES[:1])
    }
    missing = [f"{name}: no such variant" for name in NEAR_LIMITS if name not in rows]
    return [*lines_of(rows), *missing]


def committed() -> dict[str, dict]:
    return json.loads(RESULTS.read_text())["variants"] if RESULTS.exists() else {}


def write(rows: dict[str, dict]) -> None:
    parts = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows.items()))
    RESULTS.write_text(f'{{"triton": "{triton.__version__}", "variants": {{\n{parts}\n}}}}\n')


def update(name: str, precision: str, architectures: str, numbers: list[int]) -> None:
    """Replaces one line, while other processes may write others."""
    lock = os.open(RESULTS.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = committed()
        of_name = rows.setdefault(name, {}).setdefault(precision, {})
        for known in [known for known in of_name if set(known.split()) & set(architectures.split())]:
            del of_name[known]
        of_name[architectures] = numbers
        write(rows)
    finally:
        os.close(lock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "pattern", nargs="?", default="", help="regular expression of the names to compile; all by default"
    )
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--family", type=int, nargs="+", default=[0, 1, 2], help="0: 80, 86, 89, 120; 1: 90; 2: 100")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    chosen = parser.parse_args()
    families = tuple(FAMILIES[index] for index in chosen.family)
    for name, precision, architectures, numbers in compiled_rows(chosen.pattern, tuple(chosen.types), families):
        fresh = {name: {precision: {architectures: numbers}}}
        for line in lines_of(fresh):
            print(line, flush=True)
        if not chosen.dry:
            update(name, precision, architectures, numbers)
    sys.exit("\n".join(lines_of(committed())) or None)


if __name__ == "__main__":
    main()
