"""soft_mask: every backend against loops in Python, fp64 truth and gradcheck; the registered ops under opcheck."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import softmask
from softmask import ops
from tests.support.kernel_cases import needs_cpp

pytestmark = pytest.mark.usefixtures("poisoned_memory")
BACKENDS = ["reference", pytest.param("cpp", marks=needs_cpp)]
NORMALIZATIONS = ["minmax", "max", "sum", None]
SIZES = [1, 7, 63, 130, 257, 577]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make(batch: int, patches: int, width: int, *, words: int = 0, prefix: int = 1, seed: int = 0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, words, patches) if words else (batch, patches)
    features = torch.randn(batch, prefix + patches, width, generator=generator, dtype=torch.float64)
    return features.to(dtype), torch.rand(shape, generator=generator, dtype=torch.float64)


def by_hand(features: Tensor, maps: Tensor, strength: float, normalize: str | None, prefix: int) -> Tensor:
    """One map at a time, one patch at a time, in Python's floats."""

    def one(tokens: Tensor, values: list[float]) -> Tensor:
        low, high, total = min(values), max(values), sum(values)
        shift, scale = {
            "minmax": (low, high - low + 1e-7),
            "max": (0.0, high + 1e-7),
            "sum": (0.0, total + 1e-7),
            None: (0.0, 1.0),
        }[normalize]
        weights = [1.0] * prefix + [1.0 - strength * (value - shift) / scale for value in values]
        return torch.stack([token * weight for token, weight in zip(tokens, weights, strict=True)])

    if maps.dim() == 2:
        return torch.stack([one(tokens, values) for tokens, values in zip(features, maps.tolist(), strict=True)])
    return torch.stack(
        [torch.stack([one(tokens, v) for v in words]) for tokens, words in zip(features, maps.tolist(), strict=True)]
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("words", [0, 3])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_equals_python_loops(backend: str, normalize: str | None, words: int, prefix: int) -> None:
    features, maps = make(2, 7, 5, words=words, prefix=prefix)
    with softmask.backend(backend):
        out = ops.soft_mask(features, maps, strength=0.7, normalize=normalize, num_prefix_tokens=prefix)
    torch.testing.assert_close(out, by_hand(features, maps, 0.7, normalize, prefix))
    tokens = out if words else out.unsqueeze(1)
    assert torch.equal(tokens[:, :, :prefix], features[:, None, :prefix].expand_as(tokens[:, :, :prefix]))


def outcome(backend: str, features: Tensor, maps: Tensor, upstream: Tensor, **options) -> list[Tensor]:
    """Output and both gradients."""
    leaves = [features.detach().requires_grad_(), maps.detach().requires_grad_()]
    with softmask.backend(backend):
        out = ops.soft_mask(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("patches", SIZES)
@pytest.mark.parametrize("words", [0, 2])
def test_error_budget(dtype: torch.dtype, patches: int, words: int) -> None:
    """The error against fp64 is at most twice that of PyTorch, plus one rounding unit."""
    for normalize in NORMALIZATIONS:
        features, maps = make(2, patches, 63, words=words, dtype=dtype)
        maps = maps.float()
        upstream = torch.randn(out_shape(features, maps), generator=torch.Generator().manual_seed(1)).to(dtype)
        options = {"normalize": normalize, "strength": 0.9}
        truth = outcome("reference", features.double(), maps.double(), upstream, **options)
        plain = outcome("reference", features, maps, upstream, **options)
        kernel = outcome("cpp", features, maps, upstream, **options)
        for name, exact, expected, got in zip(("out", "features", "maps"), truth, plain, kernel, strict=True):
            assert got.dtype == expected.dtype
            unit = torch.finfo(got.dtype).eps * exact.abs().max()
            allowed = 2 * (expected.double() - exact).abs().max() + unit
            error = (got.double() - exact).abs().max()
            assert error <= allowed, f"{name}, normalize={normalize}: error {error:.3g}, allowed {allowed:.3g}"


def out_shape(features: Tensor, maps: Tensor) -> tuple[int, ...]:
    return (*maps.shape[:-1], *features.shape[1:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("words", [0, 2])
def test_gradcheck(backend: str, normalize: str | None, words: int) -> None:
    features, maps = make(2, 5, 3, words=words)
    with softmask.backend(backend):
        assert torch.autograd.gradcheck(
            lambda f, m: ops.soft_mask(f, m, strength=0.8, normalize=normalize),
            (features.requires_grad_(), maps.requires_grad_()),
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", ["minmax", "max"])
def test_ties_share_the_gradient(backend: str, normalize: str) -> None:
    """As in torch's amin and amax, which share the gradient evenly among ties."""
    features, _ = make(2, 6, 4)
    maps = torch.tensor([[0.1, 0.9, 0.9, 0.1, 0.1, 0.5], [0.3] * 6], dtype=torch.float64)
    upstream = torch.randn(features.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    got = outcome(backend, features, maps, upstream, normalize=normalize)[2]
    maps.requires_grad_()
    low = maps.amin(-1, keepdim=True) if normalize == "minmax" else 0.0
    weight = 1 - (maps - low) / (maps.amax(-1, keepdim=True) - low + 1e-7)
    (expected,) = torch.autograd.grad((features[:, 1:] * weight.unsqueeze(-1) * upstream[:, 1:]).sum(), maps)
    torch.testing.assert_close(got, expected)
    assert (expected[0, 1] != expected[0, 5]) and expected.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("words", [0, 2])
def test_any_strides(backend: str, words: int) -> None:
    features, maps = make(3, 7, 6, words=words)
    upstream = torch.randn(out_shape(features, maps), dtype=torch.float64)
    options = {"normalize": "minmax"}
    expected = outcome(backend, features, maps, upstream, **options)
    last_strided = features.transpose(1, 2).contiguous().transpose(1, 2)
    token_major = features.transpose(0, 1).contiguous().transpose(0, 1)
    padded = torch.cat([features, features], -1)[..., :6]
    for view in (last_strided, token_major, padded):
        assert not view.is_contiguous()
        got = outcome(backend, view, maps.mT.contiguous().mT, upstream.mT.contiguous().mT, **options)
        for left, right in zip(got, expected, strict=True):
            torch.testing.assert_close(left, right)  # sums over D may go in another order
    constant = torch.ones((), dtype=torch.float64).expand(upstream.shape)  # what .sum().backward() sends
    for left, right in zip(
        outcome(backend, features, maps, constant), outcome(backend, features, maps, constant.clone()), strict=True
    ):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_maps_zero_strength_empty_batches_and_nan(backend: str) -> None:
    with softmask.backend(backend):
        features, maps = make(2, 7, 5)
        assert torch.equal(ops.soft_mask(features, torch.full_like(maps, 0.3)), features)  # constant: nothing masked
        assert torch.equal(ops.soft_mask(features, torch.zeros_like(maps), normalize="sum"), features)
        assert torch.equal(ops.soft_mask(features, maps, strength=0.0), features)
        masked = ops.soft_mask(features.float(), maps)
        peak = maps.argmax(-1) + 1
        assert masked[torch.arange(2), peak].abs().max() < 1e-5 * features.abs().max()
        assert ops.soft_mask(features[:0], maps[:0]).shape == (0, 8, 5)
        assert ops.soft_mask(features, maps.unsqueeze(1)[:, :0]).shape == (2, 0, 8, 5)
        maps[1, 3] = float("nan")
        out = ops.soft_mask(features, maps)
        assert out[1, 1:].isnan().all() and not out[0].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_without_words(backend: str) -> None:
    features, maps = make(2, 7, 5, words=1)
    _, to_features, to_maps = outcome(backend, features, maps[:, :0], torch.ones(2, 0, 8, 5))
    assert torch.equal(to_features, torch.zeros_like(features)) and to_maps.shape == (2, 0, 7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_required_gradients_are_computed(backend: str) -> None:
    features, maps = make(2, 7, 5)
    both = outcome(backend, features, maps, torch.ones(2, 8, 5))
    with softmask.backend(backend):
        leaf = features.clone().requires_grad_()
        ops.soft_mask(leaf, maps).sum().backward()
        assert torch.equal(leaf.grad, both[1])
        leaf = maps.clone().requires_grad_()
        ops.soft_mask(features, leaf).sum().backward()
        assert torch.equal(leaf.grad, both[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_and_autocast(backend: str, dtype: torch.dtype) -> None:
    features, maps = make(2, 7, 5, dtype=dtype)
    with softmask.backend(backend):
        plain = ops.soft_mask(features, maps.float())
        assert plain.dtype == dtype
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(ops.soft_mask(features, maps.float()), plain)


def permuted(*, words: int) -> tuple[Tensor, Tensor]:
    features, maps = make(2, 6, 4, words=words, dtype=torch.float32)
    return features.transpose(0, 1).contiguous().transpose(0, 1), maps.float().mT.contiguous().mT


@needs_cpp
@pytest.mark.parametrize("words", [0, 2])
def test_opcheck(words: int) -> None:
    features, maps = permuted(words=words)
    leaves = (features.requires_grad_(), maps.requires_grad_())
    torch.library.opcheck(torch.ops.softmask.soft_mask.default, (*leaves, 0.5, "minmax", 1))
    upstream = torch.randn(out_shape(*leaves)).mT.contiguous().mT
    for saved, features_grad in ((features, True), (None, True), (features, False)):
        args = (upstream, None if saved is None else saved.detach(), maps.detach(), 0.5, "minmax", 1, features_grad)
        torch.library.opcheck(torch.ops.softmask.soft_mask_backward.default, args)


@pytest.mark.parametrize(
    ("backend", "compiler"),
    [
        ("reference", "aot_eager"),
        pytest.param("cpp", "aot_eager", marks=needs_cpp),
        pytest.param("cpp", "inductor", marks=needs_cpp),
    ],
)
def test_compile(backend: str, compiler: str) -> None:
    features, maps = permuted(words=2)

    def run(function) -> list[Tensor]:
        leaves = [features.clone().requires_grad_(), maps.clone().requires_grad_()]
        with softmask.backend(backend):
            out = function(*leaves)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    compiled = run(torch.compile(ops.SoftMask(normalize="minmax"), fullgraph=True, backend=compiler))
    for left, right in zip(compiled, run(ops.SoftMask(normalize="minmax")), strict=True):
        torch.testing.assert_close(left, right)


@needs_cpp
def test_second_derivative_raises() -> None:
    features, maps = (tensor.requires_grad_() for tensor in make(1, 3, 2))
    with softmask.backend("cpp"):
        out = ops.soft_mask(features, maps)
    (gradient,) = torch.autograd.grad(out.square().sum(), maps, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_errors_name_the_bad_argument() -> None:
    features, maps = make(2, 7, 5)
    for message, call in {
        r"features: expected shape \[B, P, D\], got \[8, 5\]": lambda: ops.soft_mask(features[0], maps),
        r"maps: expected shape \[2, 7\] or \[2, W, 7\], got \[2, 6\]": lambda: ops.soft_mask(features, maps[:, 1:]),
        r"features: expected float32 or .*, got torch.int64": lambda: ops.soft_mask(features.long(), maps),
        r"maps: expected device cpu, got meta": lambda: ops.soft_mask(features, maps.to("meta")),
        r"normalize: expected one of None, 'minmax', .*, got 'mean'": lambda: ops.soft_mask(
            features, maps, normalize="mean"
        ),
        r"num_prefix_tokens: expected 0 to 7 .*, got 8": lambda: ops.soft_mask(features, maps, num_prefix_tokens=8),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
