"""Maps of the words of a text over an image: drawing, and the section of captioned scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from torch import Tensor

from softmask.data import TokenBatch
from softmask.evaluation import grounding, metrics
from softmask.evaluation.grounding import Phrase, Word
from softmask.evaluation.one_pass import encode
from softmask.evaluation.readers import Sample, Scorer, batches
from softmask.report.images import data_uri, heat_gradient, heat_overlay, limited, soft_masked
from softmask.report.page import mark, section
from softmask.report.svg import outline_path

OVERLAY = 512  # pixels of a map's longer side
WORDS = 8  # most content words shown for a caption without objects
# Words that name nothing visible. English only; used for captions without objects, questions and statements.
EMPTY_TEXT = """
a an the this that these those some any each and or but with without of in on at by to from for into onto over
under above below beside between near next behind front left right top bottom is are was were be being been has
have had there here it its his her their they he she we you i as while who which two three four one
what how many where when why does do did only both color colour picture pictures image photo
show shows see seen can other
"""
EMPTY_WORDS = frozenset(EMPTY_TEXT.split())


@dataclass
class WordView:
    """A word of a scene: its map over the image and the image masked by it.

    Attributes:
        outline: path of the object's border in pixels; empty without a mask.
        point: pixel (row, column) of the map's peak; None for a constant map.
        hit: whether the peak lies in the mask; None without a mask.
    """

    text: str
    span: tuple[int, int]
    overlay: str
    masked: str
    outline: str
    point: tuple[int, int] | None
    hit: bool | None


@dataclass
class SceneView:
    """An image at its stored size (height, width), its caption and its words."""

    name: str
    caption: str
    image: str
    size: tuple[int, int]
    words: list[WordView]


def content_words(caption: str, tokens: TokenBatch, row: int) -> list[Word]:
    """The words of a caption without objects that may name something visible."""
    words = []
    for number in range(int(tokens.word_ids[row].max()) + 1):
        positions = (tokens.word_ids[row] == number).nonzero().flatten()
        start, end = int(tokens.offsets[row, positions, 0].min()), int(tokens.offsets[row, positions, 1].max())
        if caption[start:end].lower() not in EMPTY_WORDS:
            words.append(Word(caption[start:end], (start, end), positions.tolist()))
    return words[:WORDS]


def word_view(scorer: Scorer, sample: Sample, word: Word, patches: Tensor) -> WordView:
    """Draws one word; `patches` [gh * gw] is its map, normalized as in training."""
    config, grid = scorer.config, scorer.model.patch_grid
    seen = sample.seen
    small = limited(seen, OVERLAY)
    plane = metrics.upsample_maps(patches[None], grid, (small.height, small.width))[0]
    full = metrics.upsample_maps(patches[None], grid, (seen.height, seen.width))[0]
    mask = word.mask if isinstance(word, Phrase) else None
    masked = soft_masked(small, plane, mean=config.data.mean, strength=config.model.strength)
    return WordView(
        text=word.text,
        span=word.span,
        overlay=data_uri(heat_overlay(small, plane)),
        masked=data_uri(masked),
        outline="" if mask is None else outline_path(mask.numpy()),
        point=metrics.peak(full),
        hit=None if mask is None else metrics.pointing_hit(full, mask),
    )


def scene_views(scorer: Scorer, samples: list[Sample]) -> list[SceneView]:
    """Image, caption and word maps of each sample."""
    views = []
    for batch in batches(samples, scorer.batch_size):
        tokens = scorer.tokens([sample.caption for sample in batch])
        words: list[list[Word]] = []
        for row, sample in enumerate(batch):
            known = grounding.phrases(sample, tokens.offsets[row])
            found: Sequence[Word] = known if sample.objects else content_words(sample.caption, tokens, row)
            words.append(sorted((word for word in found if word.tokens), key=lambda word: word.span))
        maps = grounding.word_maps(scorer, encode(scorer, batch), words, normalize=scorer.config.model.normalize)
        for sample, own, planes in zip(batch, words, maps, strict=True):
            drawn = [word_view(scorer, sample, word, plane) for word, plane in zip(own, planes, strict=True)]
            seen = sample.seen
            size = (seen.height, seen.width)
            views.append(SceneView(sample.name, sample.caption, data_uri(seen), size, drawn))
    return views


# -- markup ----------------------------------------------------------------------------------------


def scenes_section(scenes: list[SceneView]) -> str:
    note = (
        "For each phrase of the caption: its Grad-CAM map, with a ring at the peak and the object's true outline, and "
        "the image soft-masked by that map, as training masks its tokens. The images are spaced evenly over the data, "
        "not selected."
    )
    legend = map_legend(f"map, scaled to its range {mark(True)} peak inside the object {mark(False)} outside")
    return section("scenes", "Word maps", note, legend + "\n".join(map(scene, scenes)))


def map_legend(text: str) -> str:
    """A scale of a map's colours, and what is to be said about them."""
    return f'<p class="legend"><span>0</span><i style="background:{heat_gradient()}"></i><span>1</span> {text}</p>\n'


def scene(view: SceneView) -> str:
    words = "".join(word(item, view.size) for item in view.words)
    caption = emphasized(view.caption, [item.span for item in view.words])
    return (
        f'<article class="scene">\n<div class="whole"><img src="{view.image}" alt="{escape(view.caption)}" '
        f'width="{view.size[1]}" height="{view.size[0]}">'
        f'<p class="quote">{caption}</p><p class="name">{escape(view.name)}</p></div>\n'
        f'<div class="words{" few" if len(view.words) <= 2 else ""}">{words}</div>\n</article>'
    )


def emphasized(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """The text with its phrases emphasized; overlapping phrases are merged."""
    parts, done = [], 0
    for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        if end > done:
            start = max(start, done)
            parts.append(f"{escape(text[done:start])}<em>{escape(text[start:end])}</em>")
            done = end
    return "".join(parts) + escape(text[done:])


def word(item: WordView, size: tuple[int, int]) -> str:
    height, width = size
    seen = {None: "", True: ", its peak inside the object", False: ", its peak outside the object"}[item.hit]
    drawing = f'<path class="halo" d="{item.outline}"/><path class="line" d="{item.outline}"/>' if item.outline else ""
    if item.point:
        place = f'cx="{item.point[1] + 0.5}" cy="{item.point[0] + 0.5}" r="{0.026 * max(size):.1f}"'
        drawing += f'<circle class="halo" {place}/><circle class="ring" {place}/>'
    name = escape(item.text)
    verdict = "" if item.hit is None else mark(item.hit)
    return (
        f'<div class="word"><p class="label"><span>{name}</span>{verdict}</p>'
        f'<div class="pair"><div class="layers"><img src="{item.overlay}" alt="Map of “{name}”{seen}">'
        f'<svg viewBox="0 0 {width} {height}" aria-hidden="true">{drawing}</svg></div>'
        f'<img src="{item.masked}" alt="Image soft-masked by “{name}”"></div></div>'
    )
