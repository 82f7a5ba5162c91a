"""A call of every op that has kernels, at any size and type, for the tests of all backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import softmask
from softmask import kernels, ops
from softmask.ops import _library

needs_cpp = pytest.mark.skipif(_library.MISSING is not None, reason=f"make env builds it: {_library.MISSING}")
needs_triton = pytest.mark.skipif(
    kernels.why_not("cpu", torch.float32) is not None, reason=str(kernels.why_not("cpu", torch.float32))
)
SIZES = [1, 7, 63, 130, 257, 577]
GAMMAS = [0.0, 0.5, 1.0, 2.0]
SCALAR_UPSTREAMS = 8  # upstream gradients for the gradient of a scalar, whose error at one of them is chance


@dataclass
class Case:
    """`call` takes the floating-point `leaves`, of which `constants` need no gradient, and the `fixed` tensors."""

    leaves: dict[str, Tensor]
    call: Callable[..., Tensor]
    constants: frozenset[str] = frozenset()
    fixed: dict[str, Tensor] = field(default_factory=dict)

    def cast(self, dtype: torch.dtype) -> Case:
        return replace(self, leaves={name: leaf.to(dtype) for name, leaf in self.leaves.items()})

    def to(self, device: str) -> Case:
        leaves, fixed = ({name: one.to(device) for name, one in group.items()} for group in (self.leaves, self.fixed))
        return replace(self, leaves=leaves, fixed=fixed)


def outcome(backend: str, case: Case, upstreams: int = 1) -> dict[str, Tensor]:
    """The result and the gradients of all leaves for a fixed random upstream; those of scalars for several."""
    leaves = {name: leaf.detach() for name, leaf in case.leaves.items()}
    wanted = [name for name in leaves if name not in case.constants]
    for name in wanted:
        leaves[name].requires_grad_()
    with softmask.backend(backend):
        out = case.call(**leaves, **case.fixed)
    if not out.requires_grad:
        return {"out": out}
    generator, numbers = torch.Generator().manual_seed(9), [name for name in wanted if leaves[name].dim() == 0]
    found: list[dict[str, Tensor]] = []
    for _ in range(upstreams if numbers else 1):
        names = wanted if not found else numbers
        upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
        grads = torch.autograd.grad(out, [leaves[name] for name in names], upstream, retain_graph=True)
        found.append(dict(zip(names, grads, strict=True)))
    several = {name: torch.stack([one[name] for one in found]) for name in numbers if len(found) > 1}
    return {"out": out.detach(), **found[0], **several}


def check_errors(backend: str, dtype: torch.dtype, *given: Case, upstreams: int = SCALAR_UPSTREAMS) -> None:
    """Assert that the error against fp64 is at most twice that of PyTorch, plus one rounding unit.

    Errors are root mean squares over all elements of the given cases, relative to the root mean square of each case's
    fp64 values: the largest of a few hundred errors is chance. So is the error of a single scalar: PyTorch's gradients
    of scalars are taken for several upstreams in each case, the kernel's for as many over all cases.
    """
    errors: dict[str, list[Tensor]] = {}
    in_torch: dict[str, list[Tensor]] = {}
    units = {}
    for case in (case.cast(dtype) for case in given):
        truth = outcome("reference", case.cast(torch.float64), upstreams)
        plain, kernel = outcome("reference", case, upstreams), outcome(backend, case, -(-upstreams // len(given)))
        for name, exact in truth.items():
            got, expected = kernel[name], plain[name]
            size = exact.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
            in_torch.setdefault(name, []).append(((expected.double() - exact) / size).flatten())
            if case.leaves.get(name, exact).dim() == 0:
                got = got.reshape(-1)
                exact, expected = (one.reshape(-1)[: len(got)] for one in (exact, expected))
            assert got.dtype == expected.dtype and got.shape == expected.shape
            errors.setdefault(name, []).append(((got.double() - exact) / size).flatten())
            units[name] = torch.finfo(got.dtype).eps
    for name, unit in units.items():
        error, of_torch = (torch.cat(parts[name]).square().mean().sqrt().item() for parts in (errors, in_torch))
        assert error <= 2 * of_torch + unit, f"{name}: error {error:.3g}, in PyTorch {of_torch:.3g}"


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit_rows(*shape: int, seed: int) -> Tensor:
    return F.normalize(normal(*shape, seed=seed), dim=-1)


def some_ids(count: int) -> Tensor:
    return torch.arange(count) * 7 % max(1, count * 2 // 3)


def heads(batch: int, tokens: int, width: int, *, seed: int, number: int = 3) -> Tensor:
    """[B, H, T, E] as a projection leaves it: tokens before heads in memory."""
    return normal(batch, tokens, number, width, seed=seed).transpose(1, 2)


def word_attention(size: int, *, gradcam: bool = True, normalize: str | None = None, masked: bool = False) -> Case:
    batch, tokens, width = 3, 5, 40
    leaves = {"query": heads(batch, tokens, width, seed=0), "key": heads(batch, size, width, seed=1)}
    if gradcam:
        leaves |= {"value": heads(batch, size, 24, seed=2), "grad_output": heads(batch, tokens, 24, seed=3)}
        leaves["value_bias"] = normal(3, 24, seed=4)
    index = torch.tensor([[[0, 3], [4, -1]], [[1, -1], [-1, -1]], [[2, 2], [-1, 0]]])
    options = {"normalize": normalize, "num_prefix_tokens": 1 if size > 1 else 0, "differentiable": True}
    fixed = {"word_index": index}
    if masked:
        fixed["key_padding_mask"] = normal(batch, size, seed=5) < 0.3
        fixed["key_padding_mask"][1] = True
    return Case(leaves, partial(ops.word_attention, **options), fixed=fixed)


def soft_mask(
    size: int, *, normalize: str | None = "minmax", words: int | None = None, prefix: int = 1, width: int = 37
) -> Case:
    shape = (2, size) if words is None else (2, words, size)
    maps = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    leaves = {"features": normal(2, size + prefix, width, seed=1), "maps": maps}
    options = {"normalize": normalize, "num_prefix_tokens": prefix, "strength": 0.7}
    return Case(leaves, partial(ops.soft_mask, **options))


def contrastive(
    size: int, *, gamma: float = 0.0, with_ids: bool = False, scale: float = 14.0, width: int = 32, alike: bool = False
) -> Case:
    """With `alike`, each text is near its image, as after training."""
    leaves = {"image": unit_rows(size, width, seed=0), "text": unit_rows(size, width, seed=1)}
    if alike:
        leaves["text"] = F.normalize(leaves["text"] + 0.3 * leaves["image"], dim=-1)
    leaves["logit_scale"] = torch.tensor(scale, dtype=torch.float64)
    fixed = {"ids": some_ids(size)} if with_ids else {}
    return Case(leaves, partial(ops.focal_contrastive_loss, gamma=gamma, reduction="none"), fixed=fixed)


def momentum_contrastive(
    size: int,
    *,
    queue: int = 130,
    gamma: float = 0.0,
    alpha: float = 0.4,
    with_ids: bool = False,
    scale: float = 14.0,
    width: int = 32,
    alike: bool = False,
    transposed: bool = False,
) -> Case:
    names = ("image", "text", "image_teacher", "text_teacher")
    leaves = {name: unit_rows(size, width, seed=seed) for seed, name in enumerate(names)}
    for name in names[1:] if alike else ():
        leaves[name] = F.normalize(leaves[name] + 0.3 * leaves["image"], dim=-1)
    leaves["logit_scale"] = torch.tensor(scale, dtype=torch.float64)
    constants = {"image_teacher", "text_teacher"}
    if queue:
        for seed, name in enumerate(("image_queue", "text_queue"), start=10):
            rows = unit_rows(queue, width, seed=seed)
            leaves[name] = rows.T.contiguous().T if transposed else rows
            constants.add(name)
    fixed = {"ids": some_ids(size)} if with_ids else {}
    if with_ids and queue:
        fixed["queue_ids"] = torch.arange(queue) % 11
    call = partial(ops.momentum_contrastive_loss, gamma=gamma, alpha=alpha, reduction="none")
    return Case(leaves, call, frozenset(constants), fixed)


def soft_mask_attention(
    size: int, *, shared: bool = True, weighted: bool = True, masked: bool = False, tokens: int = 5
) -> Case:
    index = torch.tensor([2, 0, 0, 2, 2, 3, 0]) if shared else None  # image 1 has no pair
    pairs = 7 if shared else 4
    leaves = {"query": heads(pairs, tokens, 40, seed=0), "key": heads(4, size, 40, seed=1)}
    leaves |= {"value": heads(4, size, 24, seed=2), "value_bias": normal(3, 24, seed=3)}
    fixed = {} if index is None else {"kv_index": index}
    if weighted:
        fixed["key_weight"] = torch.rand(pairs, size, generator=torch.Generator().manual_seed(4))
    if masked:
        fixed["key_padding_mask"] = normal(4, size, seed=5) < 0.3
        fixed["key_padding_mask"][2] = True
    return Case(leaves, ops.soft_mask_attention, fixed=fixed)


def masked_patch_loss(patch_size: int, *, normalize: bool = True, share: float = 0.5) -> Case:
    rows, columns = 3, 5
    leaves = {"prediction": normal(2, rows * columns, 3 * patch_size**2, seed=0)}
    leaves["images"] = normal(2, 3, rows * patch_size, columns * patch_size, seed=1)
    mask = torch.rand(2, rows * columns, generator=torch.Generator().manual_seed(2)) < share
    call = partial(ops.masked_patch_loss, patch_size=patch_size, normalize=normalize, reduction="none")
    return Case(leaves, call, frozenset({"images"}), {"mask": mask})


ALL = {
    "soft_mask": soft_mask(130),
    "word_attention": word_attention(130, normalize="minmax"),
    "contrastive": contrastive(130, gamma=2.0, with_ids=True),
    "momentum_contrastive": momentum_contrastive(63, queue=130, gamma=0.5, with_ids=True),
    "soft_mask_attention": soft_mask_attention(130, tokens=70),
    "masked_patch_loss": masked_patch_loss(16),
}
"""A case of every op with a gradient."""

SMALL = {
    "soft_mask": soft_mask(7),
    "word_attention": word_attention(7, normalize="minmax", masked=True),
    "contrastive": contrastive(7, gamma=2.0, with_ids=True),
    "momentum_contrastive": momentum_contrastive(5, queue=7, gamma=0.5, with_ids=True),
    "soft_mask_attention": soft_mask_attention(7, masked=True),
    "masked_patch_loss": masked_patch_loss(4),
}
"""A small case of each."""

assert SMALL.keys() == ALL.keys()
