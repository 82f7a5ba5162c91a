"""The Triton kernels of all ops: errors against fp64 truth, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

import softmask
from softmask import ops, reference
from softmask.ops import _backend
from softmask.ops._fused import contrastive, momentum_contrastive
from tests.support import kernel_cases as cases
from tests.support.kernel_cases import GAMMAS, SIZES, Case, check_errors, outcome

pytestmark = [cases.needs_triton, pytest.mark.usefixtures("poisoned_memory", "fast_interpreter")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMALIZATIONS = ["minmax", "max", "sum", None]
FLAGS = (True, False)
for_each_type = pytest.mark.parametrize("dtype", DTYPES)
for_each_size = pytest.mark.parametrize("size", SIZES)


@for_each_type
@for_each_size
def test_soft_mask(size: int, dtype: torch.dtype) -> None:
    # The gradient through "max" and "sum" of a single patch is 1e-7 of its terms: nothing but rounding.
    chosen = NORMALIZATIONS if size > 1 else ["minmax", None]
    check_errors("triton", dtype, *(cases.soft_mask(size, normalize=normalize) for normalize in chosen))
    check_errors("triton", dtype, cases.soft_mask(size, words=3, prefix=0))


def on_gpu_tiles(name: str, dtype: torch.dtype) -> list[Case]:
    """Cases of several tiles. The contrastive losses have every kind of gradient, several blocks of features, and with
    ids texts similar to their images; in fp32, where errors are smallest, two scales."""
    if name not in ("contrastive", "momentum_contrastive"):
        return [cases.ALL[name]]
    make = (
        partial(cases.contrastive, 40) if name == "contrastive" else partial(cases.momentum_contrastive, 35, queue=40)
    )
    every = [(gamma, with_ids) for gamma in (0.0, 0.5, 2.0) for with_ids in FLAGS]
    scales = (14.0, 100.0) if dtype == torch.float32 else (100.0,)
    return [
        make(width=72, gamma=gamma, with_ids=with_ids, scale=scale, alike=with_ids)
        for gamma, with_ids in every
        for scale in scales
    ]


@pytest.mark.parametrize("name", cases.ALL)
@pytest.mark.parametrize(
    ("architecture", "dtype"), [(80, torch.float32), pytest.param(90, torch.bfloat16, marks=pytest.mark.slow)]
)
def test_errors_with_gpu_tiles(name: str, architecture: int, dtype: torch.dtype) -> None:
    """The interpreter uses larger tiles; with those of a GPU, every loop runs several times."""
    from softmask.kernels._launch import hooked

    with hooked(lambda one: one.run(), architecture=architecture):
        check_errors("triton", dtype, *on_gpu_tiles(name, dtype))


def test_errors_with_gpu_tiles_for_many_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward of many samples uses other tiles, but must compute the forward's logits."""
    from softmask.kernels import contrastive_backward
    from softmask.kernels._launch import hooked

    monkeypatch.setattr(contrastive_backward, "MANY", 0)
    given = [cases.contrastive(40, width=72, gamma=gamma, scale=100.0) for gamma in (0.0, 2.0)]
    with hooked(lambda one: one.run(), architecture=100):
        check_errors("triton", torch.float32, *given)


@for_each_type
def test_contrastive_sums_by_regions(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for so many samples that the sums of single tiles would take much memory: regions of several tiles each way,
    the last ones smaller."""
    from softmask.kernels import _launch, contrastive

    monkeypatch.setattr(contrastive, "MOST_SUMS", 0)
    monkeypatch.setitem(contrastive.REGIONS, 0, contrastive.REGIONS[0] | {"BLOCK_M": 16, "BLOCK_N": 32, "PROGRAMS": 5})
    given = [cases.contrastive(150, gamma=gamma, with_ids=ids) for gamma in (0.0, 2.0) for ids in FLAGS]
    check_errors("triton", dtype, *given)
    seen: list[_launch.Launch] = []
    with _launch.hooked(seen.append), softmask.backend("triton"):
        given[0].cast(dtype).call(**given[0].cast(dtype).leaves)
    arguments = seen[0].arguments
    assert not arguments["SINGLE"] and arguments["tiles_down"] > 1 and arguments["tiles_across"] > 1
    assert seen[0].grid[0] > 1 and 10 % arguments["tiles_down"] and 5 % arguments["tiles_across"]


@pytest.mark.parametrize("count", [1024, 8192, 65536, 262144])
def test_contrastive_sums_take_little_memory(count: int) -> None:
    from softmask.kernels import contrastive
    from softmask.kernels._launch import hooked

    rows = torch.empty(count, 256, dtype=torch.bfloat16, device="meta")
    with hooked(lambda one: None, architecture=90):
        options, (tiles_down, tiles_across), (down, across) = contrastive._tiles(rows, count, exact=False, numbers=2)
    assert down * tiles_down * options["BLOCK_M"] >= count and across * tiles_across * options["BLOCK_N"] >= count
    assert 4 * 2 * count * (down + across) <= contrastive.MOST_SUMS * 2 * count * 256 * 2


@pytest.mark.parametrize(("name", "atomics"), [*((name, False) for name in cases.ALL), ("contrastive", True)])
def test_repeated_launches_write_the_same(name: str, atomics: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuning repeats a launch on its real tensors; one that updates its inputs must say so, and is left out."""
    from softmask.kernels import _launch, contrastive

    monkeypatch.setattr(contrastive, "ATOMICS", atomics)
    once, left_out = outcome("triton", cases.ALL[name].cast(torch.float32)), set()

    def run_twice(one: _launch.Launch) -> None:
        one.run()
        if one.updates:
            left_out.add(one.kernel.__name__)
        else:
            one.run()

    with _launch.hooked(run_twice):
        twice = outcome("triton", cases.ALL[name].cast(torch.float32))
    assert all(torch.equal(once[leaf], twice[leaf]) for leaf in once)
    expected = {"word_attention": {"_fwd_combine_kernel"}, "contrastive": {"bwd_kernel"} if atomics else set()}
    assert left_out == expected.get(name, set())


def test_soft_mask_of_a_map_with_nan() -> None:
    case = cases.soft_mask(7).cast(torch.float32)
    case.leaves["maps"][0, 3] = float("nan")
    with softmask.backend("triton"):
        out = case.call(**case.leaves)
    assert out[0, 1:].isnan().all() and out[1].isfinite().all()


@for_each_type
@for_each_size
def test_word_attention(size: int, dtype: torch.dtype) -> None:
    kinds = [{"gradcam": gradcam, "masked": masked} for gradcam in FLAGS for masked in FLAGS]
    options = [kind | {"normalize": normalize} for kind, normalize in zip(kinds, NORMALIZATIONS, strict=True)]
    chosen = options if dtype == torch.float32 else options[:1]
    check_errors("triton", dtype, *(cases.word_attention(size, **option) for option in chosen))


@for_each_type
@for_each_size
def test_contrastive(size: int, dtype: torch.dtype) -> None:
    gammas = GAMMAS if dtype == torch.float32 and size < 257 else [2.0]
    options = [{"gamma": gamma, "with_ids": with_ids} for gamma in gammas for with_ids in FLAGS]
    check_errors("triton", dtype, *(cases.contrastive(size, **chosen) for chosen in options))
    check_errors("triton", dtype, *(cases.contrastive(size, gamma=gamma, scale=100.0) for gamma in gammas))


def by(backend: str, op: str, module: object) -> Callable[..., Tensor]:
    """What an op calls after gathering the features of all ranks."""
    return getattr(reference, op) if backend == "reference" else partial(getattr(module, op), backend)


def one_rank(op: str, module: object, *, with_ids: bool) -> Case:
    """What the last of three ranks computes: its 7 rows against the rows of all ranks."""
    leaves = {name: cases.unit_rows(7, 32, seed=seed) for seed, name in enumerate(("image", "text"))}
    names, constants, options = ("all_image", "all_text"), frozenset(), {"gamma": 2.0, "first_row": 14}
    if module is momentum_contrastive:
        leaves |= {f"{name}_teacher": cases.unit_rows(7, 32, seed=2) for name in ("image", "text")}
        names, options = ("all_image_teacher", "all_text_teacher"), options | {"alpha": 0.4, "queue_ids": None}
        options |= {"image_queue": None, "text_queue": None}
        constants = frozenset({"image_teacher", "text_teacher", *names})
    leaves |= {name: cases.unit_rows(21, 32, seed=seed) for seed, name in enumerate(names, start=5)}
    leaves["logit_scale"] = torch.tensor(14.0, dtype=torch.float64)
    ids = cases.some_ids(21)
    fixed = {"ids": ids[14:], "all_ids": ids} if with_ids else {"ids": None}

    def call(**given: Tensor) -> Tensor:
        return by(_backend.resolve(op, given["image"]), op, module)(**given, **options, reduction="none")

    return Case(leaves, call, constants, fixed)


@pytest.mark.parametrize("with_ids", FLAGS)
@pytest.mark.parametrize(
    ("op", "module"),
    [("focal_contrastive_loss", contrastive), ("momentum_contrastive_loss", momentum_contrastive)],
)
def test_contrastive_losses_of_one_of_three_ranks(op: str, module: object, with_ids: bool) -> None:
    check_errors("triton", torch.float32, one_rank(op, module, with_ids=with_ids))


def test_contrastive_with_atomics(monkeypatch: pytest.MonkeyPatch) -> None:
    from softmask.kernels import contrastive as kernels

    monkeypatch.setattr(kernels, "ATOMICS", True)
    check_errors("triton", torch.float32, cases.contrastive(63, gamma=2.0, with_ids=True))


@for_each_type
@pytest.mark.parametrize("queue", [0, 7, 130, 577])
def test_momentum_contrastive(queue: int, dtype: torch.dtype) -> None:
    gammas = GAMMAS if dtype == torch.float32 else [2.0]
    options = [{"gamma": gamma, "with_ids": with_ids} for gamma in gammas for with_ids in FLAGS]
    options.append({"transposed": True})
    given = [cases.momentum_contrastive(63 if queue % 2 else 7, queue=queue, **one) for one in options]
    check_errors("triton", dtype, *given)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_momentum_contrastive_at_extremes(gamma: float) -> None:
    options = [{"gamma": gamma, "alpha": alpha, "scale": 100.0} for alpha in (0.0, 0.5, 1.0)]
    check_errors("triton", torch.float32, *(cases.momentum_contrastive(63, queue=130, **one) for one in options))


@for_each_type
def test_momentum_contrastive_of_many_rows(dtype: torch.dtype) -> None:
    given = [cases.momentum_contrastive(130, queue=63, gamma=gamma, with_ids=True) for gamma in (0.0, 2.0)]
    check_errors("triton", dtype, *given)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_momentum_contrastive_at_a_scale_of_0(gamma: float) -> None:
    # One upstream: over several, the scale's gradient, a difference of two means, has 3 to 10 times PyTorch's error.
    check_errors("triton", torch.float32, cases.momentum_contrastive(63, gamma=gamma, scale=0.0), upstreams=1)


@for_each_type
@for_each_size
def test_soft_mask_attention(size: int, dtype: torch.dtype) -> None:
    check_errors("triton", dtype, cases.soft_mask_attention(size, masked=True))


def test_soft_mask_attention_options() -> None:
    """Every one with and without the others; a text of several tiles."""
    options = [{"shared": s, "weighted": w, "masked": m} for s in FLAGS for w in FLAGS for m in FLAGS]
    check_errors("triton", torch.float32, *(cases.soft_mask_attention(63, **chosen) for chosen in options))
    check_errors("triton", torch.float32, cases.soft_mask_attention(7, masked=True, tokens=70))


@pytest.mark.parametrize("masked", FLAGS)
def test_soft_mask_attention_of_a_query_with_nan(masked: bool) -> None:
    """The output is NaN as in the reference, not zero as for a row without keys."""
    case = cases.soft_mask_attention(63, masked=masked).cast(torch.float32)
    case.leaves["query"][1, 2, 3, 4] = float("nan")  # of image 0, which has keys
    got, expected = (outcome(backend, case) for backend in ("triton", "reference"))
    assert got["out"][1, 2, 3].isnan().all() and got["out"].isnan().sum() == got["out"].shape[-1]
    assert all(torch.equal(got[leaf].isnan(), expected[leaf].isnan()) for leaf in got)


@for_each_type
@pytest.mark.parametrize("patch_size", [1, 4, 7, 16])
def test_masked_patch_loss(patch_size: int, dtype: torch.dtype) -> None:
    options = [{"normalize": normalize, "share": share} for normalize in FLAGS for share in (0.0, 0.5, 1.0)]
    check_errors("triton", dtype, *(cases.masked_patch_loss(patch_size, **chosen) for chosen in options))


def test_masked_patch_loss_of_flat_patches() -> None:
    """The target of a patch of one color is exactly 0, whatever the rounding of its mean."""
    case = cases.masked_patch_loss(7, share=1.0).cast(torch.float32)
    case.leaves["images"] = torch.full_like(case.leaves["images"], 2.2489083)
    expected = case.leaves["prediction"].double().square().mean(-1)
    torch.testing.assert_close(outcome("triton", case)["out"].double(), expected, atol=0.0, rtol=1e-6)


def test_masked_patch_loss_of_strided_inputs() -> None:
    """Other strides and types give the same bits; an empty batch gives an empty loss."""
    case = cases.masked_patch_loss(4).cast(torch.float32)
    prediction, images = case.leaves["prediction"], case.leaves["images"].half().float()
    plain = outcome("triton", replace(case, leaves={"prediction": prediction, "images": images}))
    behind_cls, cropped = torch.cat([prediction[:, :1], prediction], 1)[:, 1:], torch.cat([images, images], -1)
    for one, two in (
        (prediction, images.contiguous(memory_format=torch.channels_last)),
        (prediction.mT.contiguous().mT, images.half()),
        (behind_cls, cropped[..., :20]),
    ):
        got = outcome("triton", replace(case, leaves={"prediction": one, "images": two}))
        assert all(torch.equal(got[name], plain[name]) for name in plain)
    none = replace(case, leaves={"prediction": prediction[:0], "images": images[:0]})
    got = outcome("triton", replace(none, fixed={"mask": case.fixed["mask"][:0]}))
    assert got["out"].shape == (0, 15) and got["prediction"].shape == (0, 15, 48)


def selected(backend: str, patches: Tensor, tokens: Tensor, **options: object) -> Tensor:
    with softmask.backend(backend):
        return ops.attentive_mask(patches, tokens, **options)


@for_each_type
@pytest.mark.parametrize("select", ["high", "low"])
def test_attentive_mask(select: str, dtype: torch.dtype) -> None:
    """Selects the same patches as PyTorch; no two relevances here are within rounding of each other."""
    for size in SIZES:
        patches, tokens = (cases.normal(3, n, 33, seed=n).to(dtype) for n in (size, 9))
        padding = cases.normal(3, 9, seed=1) < 0
        padding[2] = True
        for ratio in (0.3, 0.5):
            options = {"ratio": ratio, "select": select, "token_padding_mask": padding}
            expected = selected("reference", patches, tokens, **options)
            assert torch.equal(selected("triton", patches, tokens, **options), expected)


@pytest.mark.parametrize("select", ["high", "low"])
def test_attentive_mask_of_ties_and_nan(select: str) -> None:
    patches, tokens = cases.normal(3, 130, 33, seed=0).float(), cases.normal(3, 9, 33, seed=1).float()
    patches[0, 1::2] = 2.0 * patches[0, ::2]  # the length of a patch does not matter
    patches[1, 5], patches[1, 100] = float("nan"), 0.0
    for given in (patches, patches[:, :1].expand(-1, 300, -1), torch.zeros_like(patches)):
        options = {"ratio": 0.4, "select": select}
        assert torch.equal(
            selected("triton", given, tokens, **options), selected("reference", given, tokens, **options)
        )


def test_attentive_mask_of_other_shapes() -> None:
    """More tokens than a block holds, wide features, inner strides, mixed types, empty inputs."""
    patches, tokens = cases.normal(2, 70, 300, seed=0).float(), cases.normal(2, 140, 300, seed=1).float()
    padding = cases.normal(2, 140, seed=2) < 0.5
    strided = patches.mT.contiguous().mT, tokens.mT.contiguous().mT, padding.T.contiguous().T
    for one, two, three, ratio in (
        (patches, tokens, None, 0.5),
        (*strided, 0.0),
        (*strided, 1.0),
        (patches.half(), tokens.bfloat16(), padding, 0.5),
        (patches[:0], tokens[:0], padding[:0], 0.5),
        (patches[:, :0], tokens, padding, 0.5),
        (patches[:, 1:], tokens[:, :1], None, 0.5),
    ):
        options = {"ratio": ratio, "token_padding_mask": three}
        assert torch.equal(selected("triton", one, two, **options), selected("reference", one, two, **options))
