"""`make gpu-matrix`: which Triton releases compile which kernels, each in its own folder beside the current torch.

Every variant (variants.py) goes through Triton's front end, where releases differ most, for one type and one
architecture, which take turns. The first variant of every kernel also goes through Triton's own passes, in fp32 and
bf16. --all compiles everything for all types and architectures to machine code, which takes hours. The result is
results/gpu_matrix.json.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu_matrix.json"
# Triton -> the torch releases that come with it.
PAIRS = {
    "3.2.0": "2.6",
    "3.3.1": "2.7",
    "3.4.0": "2.8",
    "3.5.1": "2.9",
    "3.6.0": "2.10, 2.11",
    "3.7.0": "2.12, 2.13",
    "3.8.0": "2.14",
}
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
NEWEST_OF_3_2 = 90  # Triton 3.2 aborts on newer ones
TYPES = ("fp32", "bf16", "tf32", "fp16")
DEEPER = ("fp32", "bf16")


def folder(version: str) -> Path:
    """The folder of this Triton release, which is installed if it is missing."""
    target = ROOT / "build" / f"triton-{version}"
    if not (target / "triton").is_dir():
        print(f"gpu-matrix: installing Triton {version} into {target.relative_to(ROOT)}", flush=True)
        command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--target", str(target), f"triton=={version}"], check=True)
    return target


def tried(every: bool) -> Iterator[tuple[str, str, object, int]]:
    """(call, form to compile to, launch, architecture) of everything that one release is tried with."""
    from benchmarks.gpu.compile import TRITON
    from benchmarks.gpu.variants import variant_launches

    architectures = [one for one in ARCHITECTURES if TRITON > (3, 2) or one <= NEWEST_OF_3_2]
    by_case = {
        (precision, architecture): list(variant_launches(precision, architecture))
        for precision in TYPES
        for architecture in architectures
    }
    kernels: dict[object, int] = {}  # in the order of their first variants
    for (precision, architecture), launches in by_case.items():
        of_type, of_architecture = TYPES.index(precision), architectures.index(architecture)
        met = set()
        for index, (variant, one) in enumerate(launches):
            kernel = kernels.setdefault(one.kernel.fn, len(kernels))
            turn = (kernel + 3 * of_type) % len(architectures) == of_architecture
            if every or (precision in DEEPER and turn and kernel not in met):
                yield variant.name, "cubin" if every else "ttgir", one, architecture
            elif (index % len(TYPES), index // len(TYPES) % len(architectures)) == (of_type, of_architecture):
                yield variant.name, "ttir", one, architecture
            met.add(kernel)


def of_this_triton(every: bool) -> dict[str, dict]:
    """What the imported Triton compiles, by call."""
    from benchmarks.gpu.compile import compiled, lowered

    calls: dict[str, dict] = {}
    for name, form, one, architecture in tried(every):
        row = calls.setdefault(name, {"ttir": 0, "ttgir": 0, "cubin": 0, "errors": []})
        try:
            compiled(one, architecture) if form == "cubin" else lowered(one, architecture, form)
        except Exception as error:  # compilers raise errors of many types
            row["errors"].append(f"{one.kernel.__name__} sm_{architecture}: {_last_line(error)}")
        else:
            row[form] += 1
    for row in calls.values():
        row["errors"] = sorted(set(row["errors"]))[:4]
    return calls


def _last_line(error: BaseException) -> str:
    """The last line of the first error: Triton's message, which follows the source lines that it quotes."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:200]


def run(version: str, every: bool) -> dict[str, dict]:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    if version != _installed():
        environment |= {"PYTHONPATH": str(folder(version)), "TRITON_CACHE_DIR": str(folder(version) / "cache")}
    command = [sys.executable, "-m", "benchmarks.gpu.matrix", "--one", *["--all"][: int(every)]]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def _installed() -> str:
    from importlib import metadata

    return metadata.version("triton")


def write(results: dict[str, dict]) -> None:
    """Writes one line per release and call, and keeps those of other releases."""
    lock = os.open(RESULTS.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _merge(results)
    finally:
        os.close(lock)


def _merge(results: dict[str, dict]) -> None:
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows |= {version: {"torch": PAIRS[version], "calls": calls} for version, calls in results.items()}
    parts = []
    for version in sorted(rows, key=lambda text: [int(part) for part in text.split(".")]):
        calls = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows[version]["calls"].items())
        parts.append(f'"{version}": {{"torch": "{rows[version]["torch"]}", "calls": {{\n{calls}\n}}}}')
    RESULTS.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def table(rows: dict[str, dict]) -> Iterator[str]:
    newest = list(rows.values())[-1]  # older releases are not compiled again for an op that is new
    yield f"{'':<36}" + "".join(f"{version:>8}" for version in rows)
    yield f"{'torch':<36}" + "".join(f"{row['torch'].split(', ')[-1]:>8}" for row in rows.values())
    for name in newest["calls"]:
        yield f"{name:<36}" + "".join(f"{_word(row['calls'].get(name)):>8}" for row in rows.values())
    for version, row in rows.items():
        for name, call in row["calls"].items():
            yield from (f"{version} {name}: {error}" for error in call["errors"][:1])


def _word(row: dict | None) -> str:
    if row is None:
        return "not run"
    return "fails" if row["errors"] else f"ok {sum(row[form] for form in ('ttir', 'ttgir', 'cubin'))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=list(PAIRS), help="releases of Triton; all by default")
    parser.add_argument("--all", action="store_true", help="every type on every architecture")
    parser.add_argument("--one", action="store_true", help="the imported Triton alone, as JSON")
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(of_this_triton(chosen.all)))
        return
    for version in chosen.versions:
        write({version: run(version, chosen.all)})
    print("\n".join(table(json.loads(RESULTS.read_text()))))


if __name__ == "__main__":
    main()
