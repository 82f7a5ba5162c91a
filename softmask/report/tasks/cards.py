"""Markup of examples: pictures, text, right answer, what the model says, and maps of the text's words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from softmask.report.page import mark, percent
from softmask.report.word_maps import emphasized


@dataclass
class Guess:
    """An answer of the model, its probability if it has one, and whether it is right if that is known."""

    name: str
    probability: float | None
    right: bool | None


@dataclass
class WordMaps:
    """A word of the text, its characters, and its map over each picture (data URIs)."""

    text: str
    span: tuple[int, int]
    overlays: list[str]


@dataclass
class Card:
    """One example.

    Attributes:
        pictures: data URIs.
        names: of the pictures, such as left and right; empty for a single one.
        text: question or statement; empty if the task has none.
        answer: the right one; empty if the file has none.
        guesses: best first.
        aside: what else there is to say, such as that it has something unseen.
        words: maps of the text's words; empty if the model has none.
    """

    pictures: list[str]
    names: Sequence[str]
    text: str
    answer: str
    guesses: list[Guess]
    aside: str
    words: list[WordMaps]


def cards(examples: Sequence[Card]) -> str:
    plain = "" if any(one.words for one in examples) else " plain"
    return f'<div class="examples{plain}">{"".join(map(_card, examples))}</div>\n'


def _card(one: Card) -> str:
    kinds = "example" + (" two" if len(one.pictures) > 1 else "")
    names = one.names or [""] * len(one.pictures)
    alt = one.text or one.answer or "picture"
    pictures = "".join(
        _figure(uri, name, alt=f"{name}: {alt}" if name else alt) for uri, name in zip(one.pictures, names, strict=True)
    )
    text = f'<p class="quote">{emphasized(one.text, [word.span for word in one.words])}</p>' if one.text else ""
    answer = f'<p class="truth">Right answer: <b>{escape(one.answer)}</b></p>' if one.answer else ""
    aside = f"<small>{escape(one.aside)}</small>" if one.aside else ""
    words = "".join(map(_word, one.words))
    maps = f'<div class="maps">{words}</div>' if one.words else ""
    return (
        f'<article class="{kinds}"><div class="seen">{pictures}</div>'
        f'<div class="said">{text}{answer}{_guesses(one.guesses)}{aside}</div>{maps}</article>\n'
    )


def _figure(uri: str, name: str, *, alt: str) -> str:
    caption = f"<figcaption>{escape(name)}</figcaption>" if name else ""
    return f'<figure>{caption}<img src="{uri}" alt="{escape(alt)}"></figure>'


def _word(word: WordMaps) -> str:
    images = "".join(f'<img src="{uri}" alt="Map of “{escape(word.text)}”">' for uri in word.overlays)
    return f'<figure class="map"><figcaption>{escape(word.text)}</figcaption><div>{images}</div></figure>'


def _guesses(guesses: Sequence[Guess]) -> str:
    return f'<table class="guesses"><tbody>{"".join(_guess(n, one) for n, one in enumerate(guesses))}</tbody></table>'


def _guess(number: int, one: Guess) -> str:
    verdict = mark(one.right) if one.right or (number == 0 and one.right is not None) else ""
    share = ""
    if one.probability is not None:
        kind = "strong" if number == 0 else "faint"
        bar = f'<div class="bar {kind}" style="width:{100 * one.probability:.2f}%"></div>'
        share = f'<td class="track">{bar}</td><td class="percent">{percent(one.probability)}</td>'
    return f'<tr><td class="verdict">{verdict}</td><th scope="row">{escape(one.name)}</th>{share}</tr>'
