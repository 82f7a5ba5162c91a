"""Write report.html of a run, a self-contained page: curves, metrics, retrieval examples, and the model's outputs.

    python train/report.py RUN --data 'data/test-*.tar' [--output RUN/report.html] [--scenes 12]

RUN is a run's folder with log.jsonl, a complete checkpoint and the metrics.json of train/evaluate.py. All images are
embedded in the page. For SoftMask++ it shows word maps: of the phrases of "objects" in a sample's .json (format:
softmask/evaluation/evaluate.py), or of all content words if there are no objects. For SyCoCa it shows generated
captions and reconstructions. The footer quotes an ATTRIBUTION.txt beside the shards. Unreadable samples are skipped and
named on stderr. If the command fails, it writes nothing.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from softmask.arguments import positive
from softmask.data import TokenBatch
from softmask.data.sources import expand_pattern
from softmask.evaluation import grounding, metrics, retrieval
from softmask.evaluation.command import (
    add_data_options,
    check_output,
    evaluation_facts,
    finish,
    load_scorer,
    name_skipped,
    open_reader,
    sizes,
)
from softmask.evaluation.gallery import Gallery, build_gallery
from softmask.evaluation.grounding import Phrase, Word
from softmask.evaluation.readers import Reader, Sample, Scorer, batches
from softmask.evaluation.retrieval import RerankBy
from softmask.files import write_atomically
from softmask.report.facts import facts, lead
from softmask.report.generated import generated
from softmask.report.images import data_uri, heat_overlay, limited, soft_masked
from softmask.report.metrics_file import is_number, read_metrics
from softmask.report.page import Candidate, Page, Query, SceneView, WordView, render
from softmask.report.svg import Series, outline_path
from softmask.tasks.base import Curve
from softmask.training.checkpoint.state import CheckpointError, read_state
from softmask.training.checkpoint.store import best_checkpoint
from softmask.training.config import PRETRAIN, ConfigError, load_config
from softmask.training.logs import read_lines

ANSWERS = 5
CAPTION_QUERIES = 5
IMAGE_QUERIES = 6
THUMBNAIL = 200  # pixels of a retrieval image's longer side
OVERLAY = 512  # pixels of a map's longer side
WORDS = 8  # most content words shown for a caption without objects
# Words that name nothing visible. English only; used for captions without objects.
EMPTY_TEXT = """
a an the this that these those some any each and or but with without of in on at by to from for into onto over
under above below beside between near next behind front left right top bottom is are was were be being been has
have had there here it its his her their they he she we you i as while who which two three four one
"""
EMPTY_WORDS = frozenset(EMPTY_TEXT.split())
GENERAL = {"loss": Curve("Loss, all terms", "nats"), "lr": Curve("Learning rate")}
NO_CURVE = ("step", "epoch", "seconds", "samples_per_second")


# -- the run ---------------------------------------------------------------------------------------


def read_log(path: Path) -> list[dict]:
    """The rows of log.jsonl, without an incomplete last line, which is still being written."""
    return [row for _, row in read_lines(path)]


def curves(rows: list[dict], known: dict[str, Curve]) -> list[Series]:
    """One series per logged number: the loss, the task's curves (`known`), the learning rate, then all others."""
    logged = dict.fromkeys(key for row in rows for key in row if key not in NO_CURVE and is_number(row[key]))
    titles = {"loss": GENERAL["loss"]} | known | GENERAL
    keys = [key for key in titles if key in logged] + [key for key in logged if key not in titles]
    series = []
    for key in keys:
        points = [(row["step"], float(row[key])) for row in rows if is_number(row.get(key))]
        curve = titles.get(key, Curve(key))
        series.append(Series(curve.title, curve.unit, [step for step, _ in points], [value for _, value in points]))
    return series


def attribution(data: str) -> str:
    """The text of all ATTRIBUTION.txt files beside the data."""
    folders = dict.fromkeys(Path(path).parent for path in expand_pattern(data))
    files = [folder / "ATTRIBUTION.txt" for folder in folders]
    return "\n\n".join(file.read_text(encoding="utf-8", errors="replace").strip() for file in files if file.is_file())


# -- retrieval -------------------------------------------------------------------------------------


def spread(total: int, wanted: int) -> list[int]:
    """`wanted` evenly spaced numbers of range(total), or all of them."""
    if total <= wanted:
        return list(range(total))
    return [round((part + 0.5) * total / wanted - 0.5) for part in range(wanted)]


@dataclass(frozen=True)
class Rerank:
    """How many candidates ITM re-ranks, and by what score."""

    candidates: int
    by: RerankBy


Answers = tuple[list[int], list[bool], int]
"""The best answers to a query, which of them are right, and how many wrong ones rank above the right one."""


def answers(
    scorer: Scorer, gallery: Gallery, queries: list[int], *, rerank: Rerank | None, by_text: bool
) -> list[Answers]:
    """The answers to each query: by ITC, re-ranked by ITM with `rerank`."""
    similarity, relevant = gallery.similarity, gallery.relevant
    if by_text:
        similarity, relevant = similarity.T, relevant.T
    scores = similarity[queries]
    if rerank is not None:
        chosen = torch.zeros(len(similarity), 1, dtype=torch.bool)
        chosen[queries] = True
        candidates = metrics.top_candidates(similarity, rerank.candidates) & chosen
        match = retrieval.match_scores(scorer, gallery, candidates.T if by_text else candidates, by=rerank.by)
        match = match.T if by_text else match
        scores = metrics.rerank(scores, candidates[queries], match[queries])
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :ANSWERS]
    right = relevant[queries].gather(1, best)
    ranks = metrics.best_ranks(scores, relevant[queries])
    return list(zip(best.tolist(), right.tolist(), ranks.tolist(), strict=True))


def retrieval_examples(
    scorer: Scorer, reader: Reader, *, samples: int, rerank: Rerank | None
) -> tuple[list[Query], list[Query]]:
    """Caption queries and image queries over the gallery of metrics.json; `rerank` is None without ITM."""
    gallery = build_gallery(scorer, reader, pairs=samples)
    asked_texts = spread(len(gallery.captions), CAPTION_QUERIES)
    asked_images = spread(len(gallery.images), IMAGE_QUERIES)
    by_text = answers(scorer, gallery, asked_texts, rerank=rerank, by_text=True)
    by_image = answers(scorer, gallery, asked_images, rerank=rerank, by_text=False)

    def shown(image: int) -> tuple[str, str]:
        (sample,) = reader.read([gallery.images[image]])
        return sample.caption, data_uri(limited(sample.seen, THUMBNAIL), quality=84)

    captions = []
    for asked, (best, right, rank) in zip(asked_texts, by_text, strict=True):
        found = []
        for image, hit in zip(best, right, strict=True):
            text, uri = shown(image)
            found.append(Candidate(text, hit, uri))
        captions.append(Query(gallery.captions[asked], found, rank))
    images = []
    for asked, (best, right, rank) in zip(asked_images, by_image, strict=True):
        found = [Candidate(gallery.captions[caption], hit) for caption, hit in zip(best, right, strict=True)]
        text, uri = shown(asked)
        images.append(Query(text, found, rank, uri))
    return captions, images


# -- scenes ----------------------------------------------------------------------------------------


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
        maps = grounding.word_maps(scorer, batch, words, normalize=scorer.config.model.normalize)
        for sample, own, planes in zip(batch, words, maps, strict=True):
            drawn = [word_view(scorer, sample, word, plane) for word, plane in zip(own, planes, strict=True)]
            seen = sample.seen
            size = (seen.height, seen.width)
            views.append(SceneView(sample.name, sample.caption, data_uri(seen), size, drawn))
    return views


# -- command line ----------------------------------------------------------------------------------


def check_evaluation(path: Path, was: dict, now: dict) -> None:
    """Checks that metrics.json is of this checkpoint, these data and these sizes.

    Raises:
        CheckpointError: naming what differs.
    """
    changed = {key: f"{key} {was.get(key)!r}, not {value!r}" for key, value in now.items() if was.get(key) != value}
    if "digest" in changed:
        changed["digest"] = "the data"
    if changed:
        differs = f"belongs to another evaluation: it differs in {'; '.join(changed.values())}"
        raise CheckpointError(f"{path} {differs}; run train/evaluate.py with this report's options first")


def build_page(options: argparse.Namespace) -> Page:
    """Collects everything that the page shows."""
    run, data, scenes = options.run, options.data, options.scenes
    checkpoint = best_checkpoint(run)
    task = load_config(checkpoint / "config.yaml").task
    if task not in (PRETRAIN, "retrieval"):
        raise ConfigError(f"{run}: a run of task {task} has no report; its figures are in metrics.json and log.jsonl")
    result = read_metrics(run / "metrics.json")
    rows = read_log(run / "log.jsonl")
    scorer = load_scorer(checkpoint, **sizes(options))
    reader = open_reader(scorer, data, options.image_root, split=options.split)
    check_evaluation(run / "metrics.json", result["evaluation"], evaluation_facts(scorer, reader, checkpoint))
    try:
        examples = result["retrieval"]
        rerank = Rerank(examples["rerank"], examples["rerank_by"]) if "itm" in examples else None
        captions, images = retrieval_examples(scorer, reader, samples=examples["samples"], rerank=rerank)
        shown = list(reader.read(spread(len(reader.source), scenes)))
        drawn = scene_views(scorer, shown) if scorer.config.find_task().shows_word_maps(scorer.config.model) else []
        written = generated(scorer, shown, result)
    finally:
        name_skipped(reader)
    return Page(
        method=scorer.config.find_task().title(scorer.config.model),
        run=run.resolve().name,
        lead=lead(scorer),
        facts=facts(scorer, read_state(checkpoint), rows),
        curves=curves(rows, scorer.config.find_task().curves),
        metrics=result,
        captions=captions,
        images=images,
        scenes=drawn,
        generated=written,
        attribution=attribution(data),
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write report.html of a run, a self-contained page.")
    parser.add_argument("run", type=Path, help="a run's folder")
    add_data_options(parser)
    parser.add_argument("--output", type=Path, help="default: report.html in RUN")
    parser.add_argument(
        "--scenes", type=positive, default=12, help="images with word maps, captions or reconstructions (default 12)"
    )
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> str:
    """Writes report.html. Returns a line that names it."""
    output = options.output or options.run / "report.html"
    check_output(output, ".html")
    write_atomically(output, render(build_page(options)))
    return f"written: {output} ({math.ceil(output.stat().st_size / 1e6)} MB)"


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    return finish("report", lambda: run(options), smaller="lower --batch-size")


if __name__ == "__main__":
    sys.exit(main())
