"""What the Triton kernels move and multiply, counted in the interpreter with the tiles of a GPU."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from tests.support import kernel_cases as cases

pytestmark = [cases.needs_triton, pytest.mark.usefixtures("fast_interpreter")]


def call_of(name: str):
    from benchmarks.gpu.cases import CALLS

    (call,) = [call for call in CALLS if call.name == name]
    return call


def count(name: str, *, architecture: int = 90, dtype: torch.dtype = torch.float16, **size: int) -> list:
    """The launches of a call at its small size, or another one."""
    from benchmarks.gpu.traffic import counted

    call = call_of(name)
    inputs = call.inputs(call.small | size, dtype, "cpu")
    with counted(architecture) as seen:
        call.run(*inputs)
    return seen


launches = lru_cache(count)


def fewest(name: str, *, dtype: torch.dtype = torch.float16) -> tuple[float, float]:
    call = call_of(name)
    return call.fewest(call.small, dtype.itemsize)


@pytest.mark.parametrize(
    "name",
    [
        "word_attention forward",
        "word_attention backward",
        "soft_mask forward",
        "soft_mask backward",
        "attentive_mask forward",
        "masked_patch_loss forward",
        "masked_patch_loss backward",
        "momentum_contrastive_loss backward",
    ],
)
@pytest.mark.parametrize(("dtype", "architecture"), [(torch.float32, 80), (torch.float16, 90)])
def test_memory_bound_kernels_move_at_most_10_percent_extra(name: str, dtype: torch.dtype, architecture: int) -> None:
    moved = sum(one.moved for one in launches(name, architecture=architecture, dtype=dtype))
    assert moved <= 1.1 * fewest(name, dtype=dtype)[0]


def test_symmetric_contrastive_loss_takes_five_products() -> None:
    both = [*launches("focal_contrastive_loss forward"), *launches("focal_contrastive_loss backward")]
    product = fewest("focal_contrastive_loss forward")[1]
    assert 5.0 * product <= sum(one.flops for one in both) <= 5.1 * product


def test_contrastive_loss_with_atomics_takes_four_products(monkeypatch: pytest.MonkeyPatch) -> None:
    from softmask.kernels import contrastive

    monkeypatch.setattr(contrastive, "ATOMICS", True)
    seen = count("focal_contrastive_loss backward")
    product = fewest("focal_contrastive_loss forward")[1]
    assert sum(one.flops for one in (*launches("focal_contrastive_loss forward"), *seen)) <= 4.1 * product


def test_momentum_loss_reads_keys_at_most_twice() -> None:
    """For gamma 0 and 64 rows in two tiles, by the bytes that further keys add to the loads."""
    name = "momentum_contrastive_loss forward"
    loaded = [sum(one.loaded for one in count(name, K=queue, D=64)) for queue in (4096, 8192)]
    stream = 2 * 4096 * 64 * torch.float16.itemsize  # of both sides
    assert loaded[1] - loaded[0] <= 2.05 * stream


def test_no_op_takes_more_than_three_launches() -> None:
    from benchmarks.gpu.cases import CALLS

    for call in CALLS:
        fewer = {"K": 1024} if "K" in call.small else {}  # the number of launches does not depend on the number of keys
        assert len(launches(call.name, **fewer)) <= 3, call.name
