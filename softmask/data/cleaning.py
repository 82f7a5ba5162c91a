"""Captions cleaned as ALBEF does: plain lower-case words, with the position of each character in the original."""

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
    """A cleaned caption."""

    text: str
    places: Spans = ()  # the span [start, end) of the original caption for each character
    cut: bool = False  # the caption had more than MOST_WORDS words


def plain_words(caption: str) -> Plain:
    """Clean a caption: HTML entities become characters, upper case lower case, ``-`` and ``/`` spaces, "<person>" (of
    Conceptual Captions) "person". The punctuation ``,.'!?"()*#:;~`` is dropped, white space collapses to single spaces,
    and at most 30 words are kept.

    The text is empty if the caption is only punctuation.
    """
    kept: list[str] = []
    spans: list[tuple[int, int]] = []
    blank = None  # span of the white space before the next word
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
    """Lower-case characters with their spans in the caption."""
    for part in _PARTS.finditer(caption):
        text, (start, end) = part.group(), part.span()
        if text.lower() == "<person>":
            yield from ((character, (start + 1 + place, start + 2 + place)) for place, character in enumerate("person"))
        else:
            text = html.unescape(text) if len(text) > 1 else text
            yield from ((character, (start, end)) for character in text.lower())
