"""The report as one HTML page, by plain functions from results to markup. No scripts, no external resources."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

from softmask.report.generated import (
    Generated,
    caption_cards,
    caption_table,
    reconstruction_note,
    reconstruction_rows,
)
from softmask.report.images import heat_gradient
from softmask.report.style import STYLE
from softmask.report.svg import Series, line_chart


@dataclass
class Candidate:
    """One answer to a retrieval query: an image (`uri`) or a caption, and whether it is right."""

    text: str
    right: bool
    uri: str = ""


@dataclass
class Query:
    """A caption (`uri` empty) or an image, with its best answers; `rank` counts wrong answers above the right one."""

    text: str
    candidates: list[Candidate]
    rank: int
    uri: str = ""


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


@dataclass
class Page:
    """Everything that the report shows; `scenes` are of SoftMask++, `generated` is of SyCoCa."""

    method: str
    run: str
    lead: str
    facts: list[tuple[str, str]]
    curves: list[Series]  # the first is drawn large
    metrics: dict  # metrics.json
    captions: list[Query]
    images: list[Query]
    scenes: list[SceneView]
    attribution: str
    generated: Generated = field(default_factory=Generated)


def render(page: Page) -> str:
    """The page as HTML."""
    title = f"{escape(page.method)} · {escape(page.run)}"
    sections = [
        header(page),
        facts_section(page.facts),
        curves_section(page.curves),
        metrics_section(page.metrics),
        retrieval_section(page.captions, page.images, reranked="itm" in page.metrics["retrieval"]),
        *([scenes_section(page.scenes)] if page.scenes else []),
        *generated_sections(page.generated),
        footer(page),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def section(name: str, title: str, note: str, body: str) -> str:
    return f'<section id="{name}">\n<h2>{title}</h2>\n<p class="note">{note}</p>\n{body}\n</section>'


# -- head: title, headline numbers, facts ----------------------------------------------------------


def header(page: Page) -> str:
    retrieval = page.metrics["retrieval"]
    best = retrieval.get("itm", retrieval["itc"])
    among = f"R@1 among {retrieval['images']}"
    tiles = [
        tile(percent(best["i2t"]["r1"]), "Image → caption", among),
        tile(percent(best["t2i"]["r1"]), "Caption → image", among),
    ]
    if "grounding" in page.metrics:
        ground = page.metrics["grounding"]
        tiles.append(tile(percent(ground["pointing"]), "Pointing game", f"random point {percent(ground['random'])} %"))
    if "captioning" in page.metrics:
        detail = f"{page.metrics['captioning']['samples']:,} captions"
        tiles.append(tile(percent(page.metrics["captioning"]["cider"]), "CIDEr", detail, unit=""))
    if "zero_shot" in page.metrics:
        shown = page.metrics["zero_shot"]
        tiles.append(tile(percent(shown["top1"]), "Zero-shot top-1", f"{shown['classes']:,} classes"))
    training = page.metrics["training"]
    time, unit = duration(training["seconds"]).split()
    tiles.append(tile(time, "Training", f"{training['steps']:,} steps", unit=f" {unit}"))
    return (
        f'<header>\n<p class="kicker">Pre-training report</p>\n'
        f"<h1>{escape(page.method)} <span>{escape(page.run)}</span></h1>\n"
        f'<p class="lead">{escape(page.lead)}</p>\n<div class="tiles">{"".join(tiles)}</div>\n</header>'
    )


def tile(value: str, name: str, detail: str, *, unit: str = " %") -> str:
    return (
        f'<div class="tile"><p class="name">{escape(name)}</p>'
        f'<p class="figure">{escape(value)}<span>{unit}</span></p><p class="detail">{escape(detail)}</p></div>'
    )


def duration(seconds: float) -> str:
    """A short text such as 5 s, 14.0 min or 3.2 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def facts_section(facts: list[tuple[str, str]]) -> str:
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f'<section id="facts">\n<h2>The run</h2>\n<dl class="facts">{rows}</dl>\n</section>'


# -- curves ----------------------------------------------------------------------------------------


def curves_section(curves: list[Series]) -> str:
    if not curves:
        return section("curves", "Training", "No step was logged.", "")
    figures = [figure(curves[0], width=1060, height=300, kind="wide")]
    small = "".join(figure(curve, width=340, height=210, kind="small") for curve in curves[1:])
    note = "Every logged step (pale) and its Gaussian average over neighbouring steps, with the final value."
    return section("curves", "Training", note, figures[0] + f'<div class="charts">{small}</div>')


def figure(series: Series, *, width: int, height: int, kind: str) -> str:
    chart = line_chart(series, width=width, height=height)
    unit = f" <span>{escape(series.unit)}</span>" if series.unit else ""
    return f'<figure class="{kind}"><figcaption>{escape(series.title)}{unit}</figcaption>{chart}</figure>'


# -- metrics ---------------------------------------------------------------------------------------


RERANKED_BY = {
    "match": " by the logit of a match",
    "difference": " by the logit of a match minus that of no match",
    "match+itc": " by the logit of a match plus the ITC similarity",
}


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


def retrieval_table(retrieval: dict) -> str:
    stages = [("itc", "ITC"), ("itm", "ITC, re-ranked by ITM"), ("chance", "Chance")]
    stages = [(stage, name) for stage, name in stages if stage in retrieval]
    ways = [("i2t", "Image → caption", retrieval), ("t2i", "Caption → image", retrieval)]
    if unseen := retrieval.get("unseen"):
        ways.append(("i2t", f"{unseen['images']:,} images with unseen objects → caption", unseen))
        ways.append(("t2i", f"{unseen['samples']:,} captions of unseen objects → image", unseen))
    groups = "".join(f'<th scope="colgroup" colspan="3">{name}</th>' for _, name in stages)
    columns = "".join(f'<th scope="col"{edge(k)}>R@{k}</th>' for _ in stages for k in (1, 5, 10))
    rows = []
    for way, name, shares in ways:
        cells = "".join(
            f'<td class="{stage}{" edge" if k == 1 else ""}">{percent(shares[stage][way][f"r{k}"])}</td>'
            for stage, _ in stages
            for k in (1, 5, 10)
        )
        rows.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    return (
        f'<div class="scroll"><table>\n<thead><tr><th rowspan="2" scope="col">Retrieval</th>{groups}</tr>'
        f"<tr>{columns}</tr></thead>\n<tbody>{''.join(rows)}</tbody></table></div>\n"
    )


def edge(k: int) -> str:
    return ' class="edge"' if k == 1 else ""


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


def bars(caption: str, rows: list[tuple[str, float, str]]) -> str:
    """A table of bars; rows are (name, share, kind), where kind is "strong", "faint" or ""."""
    body = "".join(
        f'<tr><th scope="row">{name}</th><td class="track"><div class="bar {kind}" style="width:{100 * share:.2f}%">'
        f"</div></td><td>{percent(share)}</td></tr>"
        for name, share, kind in rows
    )
    return f'<table class="bars">\n<caption>{caption}</caption>\n<tbody>{body}</tbody></table>\n'


# -- retrieval examples ----------------------------------------------------------------------------


def retrieval_section(captions: list[Query], images: list[Query], *, reranked: bool) -> str:
    rows = "".join(caption_query(query) for query in captions)
    cards = "".join(image_query(query) for query in images)
    when = " after re-ranking" if reranked else ""
    note = f"The top five answers{when} to queries spaced evenly over the gallery. {mark(True)} marks right answers."
    body = f'<h3>Caption → image</h3>\n<div class="queries">{rows}</div>\n'
    body += f'<h3>Image → caption</h3>\n<div class="cards">{cards}</div>'
    return section("retrieval", "Retrieval", note, body)


def mark(hit: bool) -> str:
    return '<span class="mark hit">✓</span>' if hit else '<span class="mark miss">✗</span>'


def standing(query: Query) -> str:
    if query.rank == 0:
        return '<span class="hit">right answer first</span>'
    return f'<span class="miss">right answer at rank {query.rank + 1}</span>'


def caption_query(query: Query) -> str:
    images = "".join(
        f'<figure class="thumb{" right" if candidate.right else ""}">'
        f'<img src="{candidate.uri}" alt="{escape(candidate.text)}">'
        f"{mark(True) if candidate.right else ''}</figure>"
        for candidate in query.candidates
    )
    return (
        f'<div class="query"><p class="quote">{escape(query.text)}<br><small>{standing(query)}</small></p>'
        f'<div class="thumbs">{images}</div></div>'
    )


def image_query(query: Query) -> str:
    lines = "".join(
        f"<li{' class=right' if candidate.right else ''}>{escape(candidate.text)}"
        f"{' ' + mark(True) if candidate.right else ''}</li>"
        for candidate in query.candidates
    )
    return (
        f'<div class="card"><img src="{query.uri}" alt="{escape(query.text)}">'
        f"<div><ol>{lines}</ol><small>{standing(query)}</small></div></div>"
    )


# -- scenes ----------------------------------------------------------------------------------------


def scenes_section(scenes: list[SceneView]) -> str:
    note = (
        "For each phrase of the caption: its Grad-CAM map, with a ring at the peak and the object's true outline, and "
        "the image soft-masked by that map, as training masks its tokens. The images are spaced evenly over the data, "
        "not selected."
    )
    legend = (
        f'<p class="legend"><span>0</span><i style="background:{heat_gradient()}"></i><span>1</span> map, scaled to '
        f"its range {mark(True)} peak inside the object {mark(False)} outside</p>\n"
    )
    return section("scenes", "Word maps", note, legend + "\n".join(map(scene, scenes)))


def scene(view: SceneView) -> str:
    words = "".join(word(item, view.size) for item in view.words)
    return (
        f'<article class="scene">\n<div class="whole"><img src="{view.image}" alt="{escape(view.caption)}" '
        f'width="{view.size[1]}" height="{view.size[0]}">'
        f'<p class="quote">{marked_caption(view)}</p><p class="name">{escape(view.name)}</p></div>\n'
        f'<div class="words{" few" if len(view.words) <= 2 else ""}">{words}</div>\n</article>'
    )


def marked_caption(view: SceneView) -> str:
    """The caption with its phrases emphasized; overlapping phrases are merged."""
    parts, done = [], 0
    for start, end in sorted((item.span for item in view.words), key=lambda span: (span[0], -span[1])):
        if end > done:
            start = max(start, done)
            parts.append(f"{escape(view.caption[done:start])}<em>{escape(view.caption[start:end])}</em>")
            done = end
    return "".join(parts) + escape(view.caption[done:])


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


# -- captions and reconstructions ------------------------------------------------------------------


def generated_sections(found: Generated) -> list[str]:
    sections = []
    if found.captions:
        note = "Generated captions of images spaced evenly over the data, not selected."
        sections.append(section("captions", "Captions", note, caption_cards(found.captions)))
    if found.reconstructions:
        note = (
            f"{found.hidden}, and reconstructed from the rest and a caption: the image's own, or the next image's. "
            "Normalized patches are shown with the true mean and contrast, as in MAE's figures."
        )
        sections.append(section("reconstructions", "Reconstructions", note, reconstruction_rows(found.reconstructions)))
    return sections


# -- footer ----------------------------------------------------------------------------------------


def footer(page: Page) -> str:
    evaluation = page.metrics["evaluation"]
    lines = f"<p>Evaluated on {escape(evaluation['data'])} in {duration(evaluation['seconds'])}.</p>"
    if page.attribution:
        lines += f'<div class="attribution">{escape(page.attribution.strip())}</div>'
    return f"<footer>\n{lines}\n</footer>"
