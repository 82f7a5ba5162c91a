"""The report as one HTML page: its frame, and the markup that its sections share. No scripts, no external resources."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from softmask.report.style import STYLE
from softmask.report.svg import Series, line_chart


@dataclass
class Page:
    """Everything that the report shows; `tiles` and `sections` are markup."""

    kicker: str
    method: str
    run: str
    lead: str
    tiles: list[str]
    facts: list[tuple[str, str]]
    curves: list[Series]  # the first is drawn large
    sections: list[str]
    training: dict  # of metrics.json
    evaluation: dict  # of metrics.json
    attribution: str


def render(page: Page) -> str:
    """The page as HTML."""
    title = f"{escape(page.method)} · {escape(page.run)}"
    sections = [header(page), facts_section(page.facts), curves_section(page.curves), *page.sections, footer(page)]
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


def mark(hit: bool) -> str:
    return '<span class="mark hit">✓</span>' if hit else '<span class="mark miss">✗</span>'


def bars(caption: str, rows: list[tuple[str, float, str]]) -> str:
    """A table of bars; rows are (name, share, kind), where kind is "strong", "faint" or ""."""
    body = "".join(
        f'<tr><th scope="row">{name}</th><td class="track"><div class="bar {kind}" style="width:{100 * share:.2f}%">'
        f"</div></td><td>{percent(share)}</td></tr>"
        for name, share, kind in rows
    )
    return f'<table class="bars">\n<caption>{caption}</caption>\n<tbody>{body}</tbody></table>\n'


# -- head: title, headline numbers, facts ----------------------------------------------------------


def header(page: Page) -> str:
    time, unit = duration(page.training["seconds"]).split()
    tiles = [*page.tiles, tile(time, "Training", f"{page.training['steps']:,} steps", unit=f" {unit}")]
    return (
        f'<header>\n<p class="kicker">{escape(page.kicker)}</p>\n'
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
    if not all(curve.smoothed for curve in curves):
        note += " Validations are drawn as they are."
    return section("curves", "Training", note, figures[0] + f'<div class="charts">{small}</div>')


def figure(series: Series, *, width: int, height: int, kind: str) -> str:
    chart = line_chart(series, width=width, height=height)
    unit = f" <span>{escape(series.unit)}</span>" if series.unit else ""
    return f'<figure class="{kind}"><figcaption>{escape(series.title)}{unit}</figcaption>{chart}</figure>'


# -- footer ----------------------------------------------------------------------------------------


def footer(page: Page) -> str:
    evaluation = page.evaluation
    lines = f"<p>Evaluated on {escape(evaluation['data'])} in {duration(evaluation['seconds'])}.</p>"
    if page.attribution:
        lines += f'<div class="attribution">{escape(page.attribution.strip())}</div>'
    return f"<footer>\n{lines}\n</footer>"
