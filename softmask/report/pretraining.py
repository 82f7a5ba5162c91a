"""The report's view of a pre-trained run, and of fine-tuned retrieval: retrieval, and what else the method can do."""

from __future__ import annotations

from typing import Any

from softmask.report.generated import caption_table, generated, generated_sections, reconstruction_note
from softmask.report.metrics_file import RETRIEVAL
from softmask.report.page import bars, percent, section, tile
from softmask.report.retrieval import Rerank, retrieval_examples, retrieval_section, retrieval_table
from softmask.report.view import Given, Shown, View, spread
from softmask.report.word_maps import scene_views, scenes_section

RERANKED_BY = {
    "match": " by the logit of a match",
    "difference": " by the logit of a match minus that of no match",
    "match+itc": " by the logit of a match plus the ITC similarity",
}


class Pretraining(View):
    """Retrieval with examples, word maps, captions and reconstructions, as far as metrics.json and the model have
    them."""

    @property
    def needed(self) -> dict[str, Any]:
        return {"retrieval": RETRIEVAL}

    def show(self, given: Given) -> Shown:
        scorer, result, found = given.scorer, given.result, given.result["retrieval"]
        rerank = Rerank(found["rerank"], found["rerank_by"]) if "itm" in found else None
        captions, images = retrieval_examples(scorer, given.reader, samples=found["samples"], rerank=rerank)
        samples = list(given.reader.read(spread(len(given.reader.source), given.count)))
        sections = [metrics_section(result), retrieval_section(captions, images, reranked=rerank is not None)]
        if self.task.shows_word_maps(scorer.config.model) and samples:
            sections.append(scenes_section(scene_views(scorer, samples)))
        return Shown(tiles(result), sections + generated_sections(generated(scorer, samples, result)))


def tiles(result: dict) -> list[str]:
    """The headline numbers."""
    retrieval = result["retrieval"]
    best = retrieval.get("itm", retrieval["itc"])
    among = f"R@1 among {retrieval['images']}"
    shown = [
        tile(percent(best["i2t"]["r1"]), "Image → caption", among),
        tile(percent(best["t2i"]["r1"]), "Caption → image", among),
    ]
    if "grounding" in result:
        ground = result["grounding"]
        shown.append(tile(percent(ground["pointing"]), "Pointing game", f"random point {percent(ground['random'])} %"))
    if "captioning" in result:
        detail = f"{result['captioning']['samples']:,} captions"
        shown.append(tile(percent(result["captioning"]["cider"]), "CIDEr", detail, unit=""))
    if "zero_shot" in result:
        named = result["zero_shot"]
        shown.append(tile(percent(named["top1"]), "Zero-shot top-1", f"{named['classes']:,} classes"))
    return shown


def metrics_section(metrics: dict) -> str:
    retrieval = metrics["retrieval"]
    by = RERANKED_BY.get(retrieval.get("rerank_by"), "")
    reranked = f"ITM re-ranks the {retrieval['rerank']} best candidates of ITC{by}. " if "itm" in retrieval else ""
    note = f"Gallery of {retrieval['images']:,} images and {retrieval['samples']:,} captions. {reranked}"
    note += "All numbers are percentages."
    body = retrieval_table(retrieval)
    if "grounding" in metrics:
        body += grounding_bars(metrics["grounding"])
    if "captioning" in metrics:
        body += caption_table(metrics["captioning"])
    if "zero_shot" in metrics:
        body += zero_shot_bars(metrics["zero_shot"])
    if "reconstruction" in metrics:
        body += reconstruction_note(metrics["reconstruction"])
    return section("metrics", "Metrics", note, body)


def grounding_bars(grounding: dict) -> str:
    rows = [
        ("Grad-CAM of the match score", grounding["pointing"], "strong"),
        ("Cross-attention", grounding["attention"], ""),
        ("Random point", grounding["random"], "faint"),
    ]
    left_out = grounding["truncated"] + grounding["hidden"]
    aside = f" Another {left_out:,} were truncated or have no visible pixel." if left_out else ""
    caption = (
        f"Pointing game: share of {grounding['words']:,} phrases in {grounding['samples']:,} images whose map peaks "
        f"inside the object.{aside}"
    )
    return bars(caption, rows)


def zero_shot_bars(section: dict) -> str:
    caption = (
        f"Zero-shot classification of {section['samples']:,} images of a single object, {section['classes']:,} classes."
    )
    rows = [("Top-1", section["top1"], "strong"), ("Top-5", section["top5"], "")]
    return bars(caption, [*rows, ("Chance", section["chance"], "faint")])
