"""Markup of a task's figures: shares beside their baselines, and confusion matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from softmask.report.page import percent

GREY = "Grey pictures"


@dataclass
class Row:
    """A share of examples that are answered rightly, and the same by other means: column -> share."""

    name: str
    samples: int
    share: float
    others: dict[str, float]


@dataclass
class Group:
    """Rows under a title, which may be empty."""

    title: str
    rows: list[Row]


def with_grey(others: dict[str, float], grey: dict[str, Any] | None, *, key: str = "accuracy") -> dict[str, float]:
    """The other shares of a row, that of grey pictures first, if it was measured."""
    return ({GREY: grey[key]} if grey else {}) | others


def share_table(groups: Sequence[Group], *, head: str, column: str) -> str:
    """A table with a bar for every row; `head` names the rows, `column` the model's share."""
    columns = list(dict.fromkeys(name for group in groups for row in group.rows for name in row.others))
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("Examples", column, *columns))
    body = "".join(_group(group, columns) for group in groups)
    return (
        f'<div class="scroll"><table class="shares">\n<thead><tr><th scope="col">{escape(head)}</th>'
        f'<th class="track"></th>{heads}</tr></thead>\n{body}</table></div>\n'
    )


def _group(group: Group, columns: Sequence[str]) -> str:
    width = 4 + len(columns)
    title = f'<tr class="group"><th scope="rowgroup" colspan="{width}">{escape(group.title)}</th></tr>'
    rows = "".join(_row(row, columns) for row in group.rows)
    return f"<tbody>{title if group.title else ''}{rows}</tbody>\n"


def _row(row: Row, columns: Sequence[str]) -> str:
    others = "".join(
        f'<td class="chance">{percent(row.others[name]) if name in row.others else "–"}</td>' for name in columns
    )
    return (
        f'<tr><th scope="row">{escape(row.name)}</th><td class="track"><div class="bar strong" '
        f'style="width:{100 * row.share:.2f}%"></div></td><td class="chance">{row.samples:,}</td>'
        f'<td class="itm">{percent(row.share)}</td>{others}</tr>'
    )


def confusion_table(counts: Sequence[Sequence[int]], labels: Sequence[str]) -> str:
    """Counts of examples by right answer (rows) and prediction (columns), with their shares of the row."""
    heads = "".join(f'<th scope="col">{escape(label)}</th>' for label in labels)
    rows = "".join(
        f'<tr><th scope="row">{escape(label)}</th>{"".join(_cell(count, sum(row)) for count in row)}</tr>'
        for label, row in zip(labels, counts, strict=True)
    )
    return (
        '<div class="scroll"><table class="confusion">\n<caption>Predictions (columns) by right answer (rows), with '
        f"shares of the row in percent.</caption>\n<thead><tr><td></td>{heads}</tr></thead>\n"
        f"<tbody>{rows}</tbody></table></div>\n"
    )


def _cell(count: int, total: int) -> str:
    share = count / total if total else 0.0
    return f'<td style="--share:{100 * share:.1f}%"><b>{percent(share)}</b> <small>{count:,}</small></td>'
