"""What the compiler makes of the CUDA C++ kernels: registers, spills, loads and stores of 16 bytes.

`python -m benchmarks.gpu.cuda` compiles csrc/cuda for every architecture, prints the rows and writes them to
results/gpu_cuda.json, whose rows are budgets. --check ARCHITECTURE compiles again and fails if a kernel spills, reads
memory in narrower pieces or, with the same nvcc, needs more registers than the file says.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
RESULTS = ROOT / "benchmarks" / "results" / "gpu_cuda.json"
ARCHITECTURES = (80, 90, 100)
TYPES = {"f": "fp32", "4Half": "fp16", "8BFloat16": "bf16"}
ENTRY = re.compile(r"([a-z_]+_kernel)(\w*?)Ev?N")
WIDE = re.compile(r"\b(ld|st)\.global\S*\.(?:v4\.[a-z]32|v2\.[a-z]64)\b")


def nvcc_version() -> str | None:
    """The release of the nvcc on the path, None without one."""
    if shutil.which("nvcc") is None:
        return None
    printed = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\S+),", printed)[1]


def rows(architecture: int) -> Iterator[dict]:
    """A row for every kernel and its constants."""
    for source in sorted(SOURCES.glob("*.cu")):
        with tempfile.TemporaryDirectory() as folder:
            target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
            kept = ["--keep", "--keep-dir", folder, "-o", f"{folder}/out.cubin"]
            command = ["nvcc", "-std=c++17", "-O3", target, "-cubin", "-Xptxas", "-v", *kept, str(source)]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            ptx = next(Path(folder).glob("*.ptx")).read_text()
        wide = {name: WIDE.findall(body) for name, body in re.findall(r"\.entry (\w+)\((.*?)\n}\n", ptx, re.DOTALL)}
        for part in report.split("Compiling entry function '")[1:]:
            symbol = part.partition("'")[0]
            yield {
                "file": source.name,
                "kernel": _name(symbol),
                "architecture": architecture,
                "registers": int(re.search(r"Used (\d+) registers", part)[1]),
                "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", part))),
                "wide_loads": wide[symbol].count("ld"),
                "wide_stores": wide[symbol].count("st"),
            }


def _name(symbol: str) -> str:
    """ "backward_kernel<bf16, 8>" for the symbol of that kernel."""
    kernel, constants = ENTRY.search(symbol).groups()
    found = re.findall(r"8BFloat16|4Half|(?<=^I)f|(?<=Li)\d+", constants)
    return f"{kernel}<{', '.join(TYPES.get(one, one) for one in found)}>" if found else kernel


def check(architecture: int) -> list[str]:
    """How the kernels of an architecture break the committed budgets, a line each."""
    committed = json.loads(RESULTS.read_text())
    same = committed["nvcc"] == nvcc_version()
    budgets = {_key(row): row for row in committed["rows"]}
    found = {_key(row): row for row in rows(architecture)}
    lines = [f"{key}: not in {RESULTS.name}; run make gpu-report" for key in found.keys() - budgets.keys()]
    for key in found.keys() & budgets.keys():
        row, budget = found[key], budgets[key]
        if row["spilled"]:
            lines.append(f"{key}: {row['spilled']} bytes of spilled registers")
        if same and row["registers"] > budget["registers"]:
            lines.append(f"{key}: {row['registers']} of {budget['registers']} registers")
        lines += [
            f"{key}: {row[kind]} of {budget[kind]} {kind.replace('_', ' ')}"
            for kind in ("wide_loads", "wide_stores")
            if same and row[kind] < budget[kind]
        ]
    return sorted(lines)


def _key(row: dict) -> str:
    return f"{row['file']} {row['kernel']} sm_{row['architecture']}"


def report() -> None:
    found = [row for architecture in ARCHITECTURES for row in rows(architecture)]
    lines = ",\n".join(json.dumps(row) for row in found)
    RESULTS.write_text(f'{{"nvcc": "{nvcc_version()}", "rows": [\n{lines}\n]}}\n')
    print(f"{'CUDA C++ kernel':<62}{'sm':>4}{'regs':>6}{'spilled':>9}  16 B loads/stores")
    for row in found:
        label = f"{row['file']}: {row['kernel']}"
        wide = f"{row['wide_loads']}/{row['wide_stores']}"
        print(f"{label:<62}{row['architecture']:>4}{row['registers']:>6}{row['spilled']:>9}  {wide}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", type=int, choices=ARCHITECTURES, help="compare with the committed budgets")
    chosen = parser.parse_args()
    if nvcc_version() is None:
        sys.exit("nvcc: not on the path; install CUDA")
    if chosen.check:
        sys.exit("\n".join(check(chosen.check)) or None)
    report()


if __name__ == "__main__":
    main()
