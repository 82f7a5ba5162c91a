"""Word maps, and the pointing game: does a word's map peak inside its object?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from softmask.data import rle
from softmask.evaluation import metrics
from softmask.evaluation.one_pass import Encoded, Measure
from softmask.evaluation.readers import Entry, Sample, Scorer, batches

MAP_KINDS = {"pointing": "gradcam", "attention": "attention"}  # key of metrics.json -> kind of map


@dataclass
class Word:
    """A word or phrase of a caption and the positions of its tokens."""

    text: str
    span: tuple[int, int]
    tokens: list[int]


@dataclass
class Phrase(Word):
    """A phrase that names an object."""

    mask: Tensor  # of the object, [h, w] bool


def phrases(sample: Sample, offsets: Tensor) -> list[Phrase]:
    """The sample's object phrases. `tokens` is empty if the phrase was cut off with the caption.

    Entries in another format are added to `bad_objects`.
    """
    words = []
    for number, entry in enumerate(sample.objects or []):
        try:
            words.append(_phrase(sample, entry, offsets))
        except ValueError as error:
            sample.bad_objects[f"{sample.name}: objects[{number}]"] = str(error)
    return words


def _phrase(sample: Sample, entry: Any, offsets: Tensor) -> Phrase:
    """The phrase of an entry of "objects". Raises ValueError if the entry is malformed."""
    try:
        text, (start, end) = entry["phrase"], entry["span"]
        if not (type(start) is type(end) is int and 0 <= start < end <= len(sample.caption)):
            raise ValueError(f"span {entry['span']} of a caption of {len(sample.caption)} characters")
        size = [sample.image.height, sample.image.width]
        if list(entry["mask"]["size"]) != size:  # before decoding allocates memory
            raise ValueError(f"mask size {entry['mask']['size']!r:.80}, expected the image's {size}")
        mask = torch.as_tensor(rle.decode(entry["mask"])).bool()  # of the stored image
        found = sample.caption[start:end]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"expected phrase, span [start, end] and mask {{size, counts}}: {reason}") from error
    if found != text:
        raise ValueError(f"span [{start}, {end}] of the caption is {found!r}, expected the phrase {text!r}")
    left, top, right, bottom = sample.box
    return Phrase(text, (start, end), metrics.tokens_of_span(offsets, (start, end)), mask[top:bottom, left:right])


@torch.no_grad()
def word_maps(
    scorer: Scorer,
    seen: Encoded,
    words: Sequence[Sequence[Word]],
    *,
    kind: str = "gradcam",
    normalize: str | None = None,
) -> list[Tensor]:
    """Maps of each sample's words over the patches: for each sample [W, gh * gw] fp32, on the CPU."""
    tokens = scorer.tokens([sample.caption for sample in seen.samples])
    index = metrics.stack_words([[word.tokens for word in row] for row in words])
    maps = scorer.word_mapper.word_maps(
        seen.tokens,
        tokens.input_ids.to(scorer.device),
        tokens.attention_mask.to(scorer.device),
        index.to(scorer.device),
        kind=kind,
        normalize=normalize,
        kv_index=torch.tensor(seen.picture, device=scorer.device),
    )
    return [plane[: len(row)].float().cpu() for plane, row in zip(maps, words, strict=True)]


@dataclass
class Tally:
    """Counts of the pointing game. `random` sums the masks' shares of their images, a random point's expected hits."""

    samples: int = 0
    words: int = 0
    truncated: int = 0  # phrases cut off with their caption
    hidden: int = 0  # objects without a visible pixel, which no point can hit
    random: float = 0.0
    pointing: int = 0
    attention: int = 0

    def add(self, other: Tally) -> None:
        for one in fields(Tally):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

    def usable(self, words: list[Phrase]) -> list[Phrase]:
        """The phrases that can be scored; counts these and the others."""
        kept = [word for word in words if word.tokens and word.mask.any()]
        self.truncated += sum(not word.tokens for word in words)
        self.hidden += sum(1 for word in words if word.tokens and not word.mask.any())
        self.samples += bool(kept)
        self.words += len(kept)
        self.random += sum(word.mask.double().mean().item() for word in kept)
        return kept

    def result(self) -> dict:
        shares = {key: getattr(self, key) / self.words for key in ("pointing", "random", "attention")}
        counts = {key: getattr(self, key) for key in ("words", "samples", "truncated", "hidden")}
        return shares | counts


class PointingGame(Measure[Tally]):
    """The metrics.json section: the pointing game over all samples with objects; None if no phrase can be scored."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def wants(self, entry: Entry) -> bool:
        return bool(entry.objects)

    def look(self, seen: Encoded) -> Tally:
        tally = Tally()
        for places in batches(range(len(seen.samples)), self.scorer.batch_size):
            self._play(seen.select(places), tally)
        return tally

    def _play(self, seen: Encoded, tally: Tally) -> None:
        """Adds the samples' phrases to the tally."""
        offsets = self.scorer.tokens([sample.caption for sample in seen.samples]).offsets
        words = [tally.usable(phrases(one, spans)) for one, spans in zip(seen.samples, offsets, strict=True)]
        if played := [place for place, row in enumerate(words) if row]:
            self._count_hits(seen.select(played), [words[place] for place in played], tally)

    def _count_hits(self, seen: Encoded, words: list[list[Phrase]], tally: Tally) -> None:
        """Adds the hits of each kind of map to the tally."""
        for key, kind in MAP_KINDS.items():
            hits = 0
            for maps, row in zip(word_maps(self.scorer, seen, words, kind=kind), words, strict=True):
                for patches, word in zip(maps, row, strict=True):
                    height, width = word.mask.shape
                    plane = metrics.upsample_maps(patches[None], self.scorer.model.patch_grid, (height, width))[0]
                    hits += metrics.pointing_hit(plane, word.mask)
            setattr(tally, key, getattr(tally, key) + hits)

    def result(self, found: Sequence[Tally]) -> dict | None:
        tally = Tally()
        for one in found:
            tally.add(one)
        return tally.result() if tally.words else None
