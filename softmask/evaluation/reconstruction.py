"""How much captions guide the reconstruction: the error of hidden patches with the right caption and with a wrong one.

Both times the same patches are hidden: those most relevant to the right caption, or random ones with `masks: random`.
The wrong caption is the next image's. If the gap between the errors is not above zero, the caption has no effect.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from softmask import ops
from softmask.evaluation.one_pass import Encoded, Measure
from softmask.evaluation.readers import Reader, Sample, Scorer

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
def reconstruct(scorer: Scorer, seen: Encoded, wrong_captions: Sequence[str]) -> Reconstructions:
    """Hides patches of samples with a picture each and reconstructs them with either caption."""
    model, images, count = scorer.reconstructor, seen.pixels, len(seen.samples)
    tokens = scorer.tokens([*(sample.caption for sample in seen.samples), *wrong_captions])
    ids, masks = tokens.input_ids.to(scorer.device), tokens.attention_mask.to(scorer.device)
    right, wrong = ((ids[:count], masks[:count]), (ids[count:], masks[count:]))
    with torch.random.fork_rng(devices=[scorer.device] if scorer.device.type == "cuda" else []):
        torch.manual_seed(SEED)
        hidden = model.hidden_patches(seen.tokens, *right)
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


def _each_image_once(samples: Iterable[Sample]) -> Iterator[Sample]:
    """The first sample of every image."""
    known: set[int] = set()
    for sample in samples:
        if sample.image_id not in known:
            known.add(sample.image_id)
            yield sample


def _with_next(samples: Iterable[Sample]) -> Iterator[tuple[Sample, str]]:
    images = _each_image_once(samples)
    last = next(images, None)
    if last is None:
        return
    first = last.caption
    for sample in images:
        yield last, sample.caption
        last = sample
    yield last, first


@dataclass
class Errors:
    """Errors of a piece's images, on the CPU."""

    right: Tensor  # [I]
    wrong: Tensor  # [I]


class Reconstruction(Measure[Errors]):
    """The metrics.json section: mean errors, and their gap with its 95 % interval over images.

    An image's wrong caption is the one of the source's next image, the last one's that of the first. None without two
    images whose captions differ.
    """

    gallery = True

    def __init__(self, scorer: Scorer, reader: Reader) -> None:
        self.scorer, self.reader = scorer, reader

    def look(self, seen: Encoded) -> Errors:
        images = seen.once()
        known = {one.index: one.caption for one in seen.samples}
        others = [self._next_caption(one, known) for one in images.samples]
        differ = [n for n, one in enumerate(images.samples) if others[n] not in (None, one.caption)]
        if not differ:
            return Errors(torch.empty(0), torch.empty(0))
        images = images.select(differ)
        one = reconstruct(self.scorer, images, [str(others[number]) for number in differ])
        return Errors(one.right_error.cpu(), one.wrong_error.cpu())

    def _next_caption(self, sample: Sample, known: dict[int, str]) -> str | None:
        """The caption of the next image in the source that has one. known: captions by number, which are not read."""
        source = self.reader.source
        own = Reader(source, self.reader.data)
        for index in chain(range(sample.index + 1, len(source)), range(sample.index)):
            if source.image_ids[index] != sample.image_id:
                if index in known:
                    return known[index]
                for entry, _ in own.entries([index]):
                    return entry.caption
        return None

    def result(self, found: Sequence[Errors]) -> dict | None:
        if not found:
            return None
        right, wrong = (torch.cat(errors) for errors in zip(*((one.right, one.wrong) for one in found), strict=True))
        if len(right) < 2:
            return None
        gap = wrong - right
        mean = gap.mean().item()
        half = Z_95 * gap.std().item() / math.sqrt(len(gap))
        means = {"right": right.mean().item(), "wrong": right.mean().item() + mean}
        return {"samples": len(gap), **means, "gap": mean, "low": mean - half, "high": mean + half}
