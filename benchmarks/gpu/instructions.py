"""Counts the instructions of a compiled kernel, by disassembling it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA")  # tensor-core instructions of sm_80, sm_90 and sm_100


def counts(cubin: bytes) -> tuple[int, int]:
    """(instructions of the kernel, instructions of its longest innermost loop with products: the slots that a warp
    takes for one pass). Branches count as taken, also those that few tiles take. 0 without such a loop."""
    code, loops = disassembled(cubin)
    lengths = [end - start for start, end in _innermost([one for one in loops if _multiplies(code[slice(*one)])])]
    return len(code), max(lengths, default=0)


def disassembled(cubin: bytes) -> tuple[list[str], list[tuple[int, int]]]:
    """(the names of all instructions, the loops as [start, end) of their positions)."""
    names: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[str, int]] = []
    for line in printed("nvdisasm", "-c", cubin=cubin).splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(names)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\S+)(.*)", line):
            names.append(found[1].rstrip(";"))
            if found[1].startswith("BRA") and (target := re.search(r"`\((\.L_\w+)\)", found[2])):
                branches.append((target[1], len(names)))
    return names, [(labels[target], end) for target, end in branches if labels.get(target, end) < end]


def printed(tool: str, *options: str, cubin: bytes) -> str:
    """What a tool that comes with Triton prints of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / tool), *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _multiplies(code: list[str]) -> bool:
    return any(name.startswith(PRODUCTS) for name in code)


def _innermost(loops: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [
        one for one in loops if not any(other != one and one[0] <= other[0] and other[1] <= one[1] for other in loops)
    ]
