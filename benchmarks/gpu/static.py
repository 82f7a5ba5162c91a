"""Compiles launches ahead of time and reads from the machine code what a GPU would need to run them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from benchmarks.gpu.compile import compiled
from benchmarks.gpu.instructions import counts, printed
from softmask.kernels._launch import Launch

ARCHITECTURES = (80, 90, 100)  # of the report; budgets.py covers all
REGISTERS = 65536  # per multiprocessor
WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
BLOCKS = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}
SHARED = {80: 164 << 10, 86: 100 << 10, 89: 100 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}  # bytes
RESERVED_SHARED = 1 << 10  # bytes that each block takes besides its own; a block can have the rest
TENSOR_CORE = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")


@dataclass(frozen=True)
class Static:
    """One kernel, compiled for one architecture. Widths are the bytes that a thread moves with one instruction."""

    kernel: str
    architecture: int
    warps: int
    registers: int  # per thread
    local: int  # bytes of local memory per thread: spilled registers
    shared: int  # bytes per block
    instructions: int  # of the whole kernel
    loop: int  # of its longest loop with products; 0 without one
    occupancy: float  # share of the warps that a multiprocessor can hold
    load_widths: dict[int, int]  # width -> number of instructions, including asynchronous copies
    store_widths: dict[int, int]
    async_copies: int
    tensor_core: dict[str, int]  # instruction -> number
    dots: int  # products in the source's intermediate form
    races: int  # chunks in shared memory that a copy may overwrite under a pending wgmma


def compile_launch(one: Launch, architecture: int) -> Static:
    kernel = compiled(one, architecture)
    registers, local = _resources(kernel.asm["cubin"])
    instructions, loop = counts(kernel.asm["cubin"])
    ptx, shared = kernel.asm["ptx"], kernel.metadata.shared
    copies = [int(width, 0) for width in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x[0-9a-f]+|\d+)", ptx)]
    loads = Counter(_width(*found) for found in _global_accesses("ld", ptx))
    return Static(
        kernel=one.kernel.__name__,
        architecture=architecture,
        warps=one.num_warps,
        registers=registers,
        local=local,
        shared=shared,
        instructions=instructions,
        loop=loop,
        occupancy=_occupancy(architecture, registers, shared, one.num_warps),
        load_widths=dict(sorted((loads + Counter(copies)).items())),
        store_widths=dict(sorted(Counter(_width(*found) for found in _global_accesses("st", ptx)).items())),
        async_copies=len(copies),
        tensor_core={name: ptx.count(name) for name in TENSOR_CORE if name in ptx},
        dots=kernel.asm["ttir"].count("tt.dot "),
        races=_races(kernel.asm["ttgir"]),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory per thread."""
    text = printed("cuobjdump", "--dump-resource-usage", cubin=cubin)
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    registers, stack, local = map(int, found)
    return registers, stack + local


def _occupancy(architecture: int, registers: int, shared: int, warps: int) -> float:
    """Share of a multiprocessor's warps that run at once, limited by registers (allocated in units of 256), shared
    memory, warps."""
    of_a_warp = -(-registers * 32 // 256) * 256
    fit = SHARED[architecture] // (shared + RESERVED_SHARED)
    blocks = min(REGISTERS // (of_a_warp * warps), WARPS[architecture] // warps, BLOCKS[architecture], fit)
    return blocks * warps / WARPS[architecture]


def most_shared(architecture: int) -> int:
    """Bytes of shared memory that a block can have."""
    return SHARED[architecture] - RESERVED_SHARED


def _global_accesses(which: str, ptx: str) -> list[tuple[str, str]]:
    """(vector, bits of an element) of every load or store of global memory."""
    return re.findall(rf"\b{which}\.(?:volatile\.|relaxed\.\w+\.)?global[\w.:]*?(?:\.(v\d))?\.[bfus](\d+)\b", ptx)


def _width(vector: str, bits: str) -> int:
    return int(vector[1:] or 1) * int(bits) // 8 if vector else int(bits) // 8


def _races(ttgir: str) -> int:
    """Chunks of a pipelined loop that both wgmma and other instructions read, while products are pending.

    Triton 3.8 gives them one buffer too few, and the next copy may overwrite what a product still reads
    (triton-lang/triton#6691).
    """
    if not re.search(r"pendings = [1-9]", ttgir):
        return 0
    buffers = set(re.findall(r"(%\S+) = ttg\.local_alloc : \(\)", ttgir))
    views = dict(re.findall(r"(%\S+) = ttg\.memdesc_(?:index|trans|subslice|reinterpret) (%\w+)", ttgir))

    def buffer(name: str) -> str:
        while name in views:
            name = views[name]
        return name

    products = re.findall(r"ttng\.warp_group_dot (%\w+), (%\w+)", ttgir)
    by_wgmma = {buffer(name) for operands in products for name in operands}
    by_loads = {buffer(name) for name in re.findall(r"ttg\.local_load (%\w+)", ttgir)}
    return len(buffers & by_wgmma & by_loads)
