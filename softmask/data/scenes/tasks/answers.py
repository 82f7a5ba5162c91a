"""What ten people answer to a question: most of them alike."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from softmask.data.scenes.concepts import Concept

PEOPLE = 10
_DISPUTED = 1 / 3  # share of the questions to which somebody answers otherwise
_MOST_OTHERS = 4


def answers_of_ten(answer: str, others: Sequence[str], rng: Random) -> list[dict[str, Any]]:
    """VQA's "answers": at least six are ``answer``, the rest are of ``others``."""
    deviating = rng.randint(1, _MOST_OTHERS) if rng.random() < _DISPUTED else 0
    who = set(rng.sample(range(PEOPLE), deviating))
    return [
        {
            "answer": rng.choice(others) if person in who else answer,
            "answer_confidence": "maybe" if person in who else "yes",
            "answer_id": person + 1,
        }
        for person in range(PEOPLE)
    ]


def variants_of(concept: Concept) -> tuple[str, ...]:
    """Other numbers of the name: "owls" for an owl, "cherry" for cherries; none of "broccoli"."""
    if concept.form == "count":
        return (concept.plural,) if concept.plural != concept.name else ()
    if concept.form == "pair":
        return (f"pair of {concept.name}",)
    if concept.name.endswith("ies"):
        return (f"{concept.name[:-3]}y",)
    return (concept.name[:-1],) if concept.name.endswith("s") else ()
