"""VQA's accuracy and its normalization of answers, by cases made by hand from the official code."""

from __future__ import annotations

import pytest

from softmask.data import Record
from softmask.evaluation.tasks.examples import Prediction
from softmask.evaluation.tasks.vqa import scores
from softmask.evaluation.tasks.vqa_accuracy import normalize_answer, vqa_accuracy


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("Yes", "yes"),
        ("  two\tdogs\n", "2 dogs"),
        # articles
        ("a dog", "dog"),
        ("The cat and an owl", "cat and owl"),
        ("the", ""),
        ("theatre", "theatre"),
        # numbers
        ("none", "0"),
        ("Ten", "10"),
        ("left one", "left 1"),
        ("eleven", "eleven"),
        ("someone", "someone"),
        ("2.5", "2.5"),
        (".5", ".5"),
        ("5.", "5"),
        ("1,000", "1000"),
        ("$1,000,000", "$1000000"),
        ("3, 4", "3 4"),
        ("2:50 p.m.", "2:50 pm"),
        # contractions
        ("dont", "don't"),
        ("Isnt it", "isn't it"),
        ("don't", "don't"),
        ("couldntve", "couldntve"),
        ("shouldn'tve", "shouldn't've"),
        ("oclock", "o'clock"),
        ("somebody'd", "somebodyd"),
        ("im", "im"),  # the official table has "Im", which no lower-case word equals
        # punctuation
        ("yes!", "yes"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("black/ white-red", "black white red"),
        ("t-shirt", "t shirt"),
        ("t-shirt - red", "tshirt red"),  # a sign with a space beside it somewhere is removed everywhere
        ("a-b 1,000", "ab 1000"),  # as are all signs beside a number with a comma
        ("girl's", "girl's"),
        ("(red)", "red"),
        ("e.g. this", "eg this"),
        ("ok." + "." * 31, "ok"),
        ("ok." + "." * 32, "ok."),
        ("50%", "50%"),
        ("a@b", "b"),  # the sign becomes a space, then "a" is an article
        ("", ""),
    ],
)
def test_normalization(text, normalized):
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize(
    ("equal", "accuracy"),
    # Without one of the equal ones there are equal - 1 others, without one of the rest there are equal.
    [(0, 0), (1, 9 * 1 / 3 / 10), (2, (2 * 1 / 3 + 8 * 2 / 3) / 10), (3, (3 * 2 / 3 + 7) / 10), (4, 1), (9, 1)],
)
def test_accuracy_by_number_of_equal_answers(equal, accuracy):
    answers = ["cat"] * equal + ["dog"] * (10 - equal)
    assert vqa_accuracy("cat", answers) == pytest.approx(accuracy, abs=1e-12)


@pytest.mark.parametrize("accuracy_of", [("The cat.", "cat"), ("two", "2"), ("dont", "don't"), ("CAT", "cat")])
def test_answers_that_differ_are_normalized_on_both_sides(accuracy_of):
    one, other = accuracy_of
    assert vqa_accuracy(one, [other] * 4 + ["bird"] * 6) == 1
    assert vqa_accuracy(other, [one] * 4 + ["bird"] * 6) == 1
    assert vqa_accuracy(one, [one, one, other, other] + ["bird"] * 6) == 1


def test_ten_equal_answers_are_left_as_they_are():
    assert vqa_accuracy("black", ["black"] * 10) == 1
    assert vqa_accuracy("Black.", ["black"] * 10) == 0
    assert vqa_accuracy("none", ["none"] * 10) == 1 and vqa_accuracy("0", ["none"] * 10) == 0
    assert vqa_accuracy(" The\tcat\n", ["the cat"] * 9 + [" The cat"]) == 1, "white space, and case once they differ"
    assert vqa_accuracy("the\tcat ", ["the cat", " the cat\n"] * 5) == 1, "white space does not make them differ"
    assert vqa_accuracy("cat", ["the cat", " the cat\n"] * 5) == 0


def test_one_answer_has_no_others():
    """Visual Genome has one: nothing is left beside it, as in the official code."""
    assert vqa_accuracy("red", ["red"]) == 0
    with pytest.raises(ValueError, match="expected the answers of people, got none"):
        vqa_accuracy("red", [])


def test_majority_is_the_accuracy_of_the_most_frequent_answer() -> None:
    """Of 40 answers 18 are "yes": it has full accuracy in two questions, a third of it in one, none in the last."""
    people = (["yes"] * 10, ["yes"] * 7 + ["no"] * 3, ["yes"] + ["two"] * 9, ["two"] * 6 + ["2"] * 4)
    kinds = ("yes/no", "yes/no", "number", "number")
    predictions = [
        Prediction(number, record(answers, kind), [("two", 0.0)], cut=False)
        for number, (answers, kind) in enumerate(zip(people, kinds, strict=True))
    ]
    found = scores(predictions)
    one_of_ten = vqa_accuracy("yes", people[2])
    assert 0 < one_of_ten < 1 and found["majority"] == pytest.approx((2 + one_of_ten) / 4)
    assert found["accuracy"] == pytest.approx(2 / 4)
    assert found["answer_type"]["yes/no"] == {"samples": 2, "accuracy": 0.0, "majority": 1.0}
    assert found["answer_type"]["number"]["majority"] == pytest.approx(1.0)


def record(answers: list[str], kind: str) -> Record:
    return Record(b"", "how many?", 0, "a", target={"answers": answers, "answer_type": kind})
