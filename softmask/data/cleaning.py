"""Captions as ALBEF reads them: plain lower-case words, told where in the caption each character stood."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

MOST_WORDS = 30
REMOVED = frozenset(",.'!?\"()*#:;~")
BLANKS = frozenset("-/")
_PARTS = re.compile(r"&(?:#\d+|#[xX][0-9a-fA-F]+|[a-zA-Z]\w*);|<person>|.", re.DOTALL | re.IGNORECASE)

Spans = Sequence[tuple[int, int]]


class Plain(NamedTuple):
    text: str
    places: Spans = ()  # of each of its characters: the span [start, end) of the caption that it comes from
    cut: bool = False  # there were more words


def plain_words(caption: str) -> Plain:
    """HTML entities as characters, lower case, no punctuation (of ``,.'!?"()*#:;~``), blanks for ``-`` and ``/``,
    "person" for "<person>" (as Conceptual Captions has it), single blanks, at most 30 words.

    The text is empty where a caption is nothing but punctuation.
    """
    kept: list[str] = []
    spans: list[tuple[int, int]] = []
    blank = None  # the span of blanks before the next word
    words = 0
    for character, span in _characters(caption):
        if character in REMOVED:
            continue
        if character in BLANKS or character.isspace():
            blank = blank or span
            continue
        if blank or not kept:
            if words == MOST_WORDS:
                return Plain("".join(kept), spans, cut=True)
            words += 1
            if blank and kept:
                kept.append(" ")
                spans.append(blank)
        blank = None
        kept.append(character)
        spans.append(span)
    return Plain("".join(kept), spans)


def _characters(caption: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Lower-case characters, and where they come from."""
    for part in _PARTS.finditer(caption):
        text, (start, end) = part.group(), part.span()
        if text.lower() == "<person>":
            yield from ((character, (start + 1 + place, start + 2 + place)) for place, character in enumerate("person"))
        else:
            text = html.unescape(text) if len(text) > 1 else text
            yield from ((character, (start, end)) for character in text.lower())
