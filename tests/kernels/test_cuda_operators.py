"""The CUDA extension's operators, compiled with torch for CPU tensors: arguments, layouts and types on their way to the
kernels."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from tests.support import cuda_host
from tests.support.cuda_host import COMPILER, CSRC, FLAGS, ROOT

pytestmark = [cuda_host.needs_compiler, pytest.mark.slow]
OPS = ("soft_mask", "word_attention")
CHECKS = """
import sys
import torch
torch.ops.load_library(sys.argv[1])
from softmask.ops import _backend
from tests.kernels import test_cuda_soft_mask as soft_mask
from tests.kernels import test_cuda_word_attention as word_attention

_backend._why_not_cuda = lambda *_: None
torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
for test in (soft_mask, word_attention):
    for dtype in test.DTYPES:
        test.test_errors(63, dtype, None)
        test.test_errors_at_the_edges_of_blocks(dtype, None)
        for layout in test.LAYOUTS:
            test.test_errors_of_layouts(layout, dtype, None)
for dtype in soft_mask.DTYPES:
    word_attention.test_errors_of_mixed_types(dtype, None)
    for map_dtype in soft_mask.DTYPES:
        soft_mask.test_errors_of_mixed_types(dtype, map_dtype, None)
soft_mask.test_upstream_gradient_of_any_layout(None)
soft_mask.test_empty_batches(None)
soft_mask.test_opcheck(None)
word_attention.test_ignored_and_prefix_keys_are_not_read(None)
word_attention.test_token_beyond_the_text_gives_nan(None)
for sizes in ((0, 2), (2, 0)):
    word_attention.test_without_words(*sizes, None)
word_attention.test_opcheck(True, None)
print("checked")
"""


def test_operators_of_the_extension(tmp_path: Path) -> None:
    includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    folder = str(Path(torch.__file__).parent / "lib")
    flags = [flag for flag in FLAGS if flag not in ("-Wextra", "-fvisibility=hidden", "-std=c++17")]
    command = [*COMPILER, *flags, "-std=c++20", *(f"-isystem{path}" for path in includes), "-x", "c++"]
    command += [str(path) for op in OPS for path in (*CSRC.glob(f"{op}.cu"), *CSRC.glob(f"{op}_*.c*"))]
    command += [f"-L{folder}", f"-Wl,-rpath,{folder}", "-lc10", "-ltorch_cpu", "-o", str(tmp_path / "operators.so")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    checked = subprocess.run(
        [sys.executable, "-c", CHECKS, str(tmp_path / "operators.so")], cwd=ROOT, capture_output=True, text=True
    )
    assert checked.stdout == "checked\n", checked.stderr
