"""Retrieval in the report: the table of recalls, and answers to a few queries."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import torch

from softmask.evaluation import metrics, retrieval
from softmask.evaluation.gallery import Gallery, build_gallery
from softmask.evaluation.readers import Reader, Scorer
from softmask.evaluation.retrieval import RerankBy
from softmask.report.images import data_uri, limited
from softmask.report.page import mark, percent, section
from softmask.report.view import spread

ANSWERS = 5
CAPTION_QUERIES = 5
IMAGE_QUERIES = 6
THUMBNAIL = 200  # pixels of a retrieval image's longer side


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


# -- markup ----------------------------------------------------------------------------------------


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


def retrieval_section(captions: list[Query], images: list[Query], *, reranked: bool) -> str:
    rows = "".join(caption_query(query) for query in captions)
    cards = "".join(image_query(query) for query in images)
    when = " after re-ranking" if reranked else ""
    note = f"The top five answers{when} to queries spaced evenly over the gallery. {mark(True)} marks right answers."
    body = f'<h3>Caption → image</h3>\n<div class="queries">{rows}</div>\n'
    body += f'<h3>Image → caption</h3>\n<div class="cards">{cards}</div>'
    return section("retrieval", "Retrieval", note, body)


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
