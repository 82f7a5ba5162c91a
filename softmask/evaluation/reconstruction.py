"""How much captions guide the reconstruction: the error of hidden patches with the right caption and with a wrong one.

Both times the same patches are hidden: those most relevant to the right caption, or random ones with `masks: random`.
The wrong caption is the next image's. If the gap between the errors is not above zero, the caption has no effect.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softmask import ops
from softmask.evaluation.readers import Sample, Scorer, batches, each_image_once, pixels

SEED = 0  # of random patches (`masks: random`)
Z_95 = 1.96  # two-sided 95 % of a normal distribution


@dataclass
class Reconstructions:
    """Reconstructions of B images with the right caption and with a wrong one."""

    images: Tensor  # [B, 3, S, S], normalized
    hidden: Tensor  # [B, P] bool
    right: Tensor  # [B, P, 3 * p**2], predicted pixels
    wrong: Tensor  # [B, P, 3 * p**2]
    right_error: Tensor  # [B]
    wrong_error: Tensor  # [B]


@torch.no_grad()
def reconstruct(scorer: Scorer, samples: Sequence[Sample], wrong_captions: Sequence[str]) -> Reconstructions:
    """Hides patches of the samples and reconstructs them with either caption."""
    model, images = scorer.reconstructor, pixels(scorer, samples)
    tokens = scorer.tokens([*(sample.caption for sample in samples), *wrong_captions])
    ids, masks = tokens.input_ids.to(scorer.device), tokens.attention_mask.to(scorer.device)
    right, wrong = ((ids[: len(samples)], masks[: len(samples)]), (ids[len(samples) :], masks[len(samples) :]))
    with torch.random.fork_rng(devices=[scorer.device] if scorer.device.type == "cuda" else []):
        torch.manual_seed(SEED)
        hidden = model.hidden_patches(images, *right)
    reconstructed = [model.reconstruct(images, hidden, *caption) for caption in (right, wrong)]
    errors = [error_by_image(scorer, one, images, hidden) for one in reconstructed]
    return Reconstructions(images, hidden, *reconstructed, *errors)


def error_by_image(scorer: Scorer, reconstructed: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
    """TG-MIM's loss of each image, [B] fp64."""
    options = {"patch_size": scorer.reconstructor.patch_size, "normalize": scorer.config.model.normalize_pixels}
    loss = ops.masked_patch_loss(reconstructed, images, hidden, reduction="none", **options)
    return (loss.sum(1) / hidden.sum(1)).double().cpu()


def with_another(samples: Iterable[Sample]) -> Iterator[tuple[Sample, str]]:
    """The first sample of each image with the next image's caption; the last one gets the first's.

    Skips an image if the next one has the same caption. Holds two samples at a time.
    """
    return ((sample, other) for sample, other in _with_next(samples) if other != sample.caption)


def _with_next(samples: Iterable[Sample]) -> Iterator[tuple[Sample, str]]:
    images = each_image_once(samples, {})
    last = next(images, None)
    if last is None:
        return
    first = last.caption
    for sample in images:
        yield last, sample.caption
        last = sample
    yield last, first


def reconstruction(scorer: Scorer, samples: Iterable[Sample]) -> dict | None:
    """The metrics.json section: mean errors, and their gap with its 95 % interval over images.

    None without two images whose captions differ.
    """
    gaps, rights = [], []
    for batch in batches(with_another(samples), scorer.batch_size):
        one = reconstruct(scorer, [sample for sample, _ in batch], [other for _, other in batch])
        rights.append(one.right_error)
        gaps.append(one.wrong_error - one.right_error)
    if not gaps:
        return None
    right, gap = torch.cat(rights), torch.cat(gaps)  # two or more: captions that differ come in pairs
    mean = gap.mean().item()
    half = Z_95 * gap.std().item() / math.sqrt(len(gap))
    errors = {"right": right.mean().item(), "wrong": right.mean().item() + mean}
    return {"samples": len(gap), **errors, "gap": mean, "low": mean - half, "high": mean + half}
