"""Words of the tasks' sentences."""

from __future__ import annotations

from softmask.data.scenes.captions import name_one
from softmask.data.scenes.concepts import Concept
from softmask.data.scenes.tasks.relations import Relation

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven")
PLACES: dict[Relation, str] = {
    "above": "above", "below": "below", "left": "to the left of", "right": "to the right of",
}  # fmt: skip


def one_of(concept: Concept) -> str:
    """The words "owl", "pair of jeans", "cherries": what an article or "the" precedes."""
    return f"pair of {concept.name}" if concept.form == "pair" else concept.name


def many(concept: Concept) -> str:
    """The words "owls", "pairs of jeans": what numbers above one precede."""
    return f"pairs of {concept.name}" if concept.form == "pair" else concept.plural


def counted(concept: Concept, count: int) -> str:
    """The words "one owl", "two owls"."""
    return f"{NUMBERS[count]} {one_of(concept) if count == 1 else many(concept)}"


def shown(concept: Concept, count: int) -> str:
    """The words "an owl", "some cherries", "two owls"."""
    return name_one(concept) if count == 1 else counted(concept, count)


def the(concept: Concept) -> str:
    """A single drawing: "the owl", "the cherries"."""
    return f"the {concept.name}"


def is_plural(concept: Concept) -> bool:
    """Whether the name of a single drawing takes "are"."""
    return concept.form == "pair" or (concept.form == "some" and concept.name.endswith("s"))


def be(concept: Concept) -> str:
    """The word "is" or "are" for a single drawing."""
    return "are" if is_plural(concept) else "is"


def on_background(color: str) -> str:
    """The words "a green background"."""
    return f"{'an' if color[0] in 'aeiou' else 'a'} {color} background"
