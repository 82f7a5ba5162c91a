"""The accuracy of an answer to a question that ten people answered, as the official evaluation of VQA computes it.

Source: GT-Vision-Lab/VQA, `PythonEvaluationTools/vqaEvaluation/vqaEval.py`, and its issue #14.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # without apostrophe, colon and period
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
PERIODS = 32  # the official code removes no more: it passes a flag, re.UNICODE, as their number
ARTICLES = ("a", "an", "the")
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(number) for number, word in enumerate(NUMBER_WORDS)} | {"none": "0"}
ENOUGH = 3  # people who give an answer that is then right
# The official table, typing errors included, without entries that change nothing or have a capital and never match.
_CONTRACTIONS = """
aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've
didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't
havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's isnt:isn't
itd:it'd itd've:it'd've it'dve:it'd've itll:it'll maam:ma'am mightnt:mightn't mightnt've:mightn't've
mightn'tve:mightn't've mightve:might've mustnt:mustn't mustve:must've neednt:needn't notve:not've oclock:o'clock
oughtnt:oughtn't ow's'at:'ow's'at 'ows'at:'ow's'at 'ow'sat:'ow's'at shant:shan't shed've:she'd've she'dve:she'd've
shouldve:should've shouldnt:shouldn't shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd
somebodyd've:somebody'd've somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's someoned:someone'd
someoned've:someone'd've someone'dve:someone'd've someonell:someone'll someones:someone's somethingd:something'd
somethingd've:something'd've something'dve:something'd've somethingll:something'll thats:that's thered:there'd
thered've:there'd've there'dve:there'd've therere:there're theres:there's theyd:they'd theyd've:they'd've
they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've
we'dve:we'd've weve:we've werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've whens:when's
whered:where'd wheres:where's whereve:where've whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll whos:who's
whove:who've whyll:why'll whyre:why're whys:why's wont:won't wouldve:would've wouldnt:wouldn't
wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've
y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've you'dve:you'd've youll:you'll youre:you're
youve:you've
"""
CONTRACTIONS = dict(pair.split(":", 1) for pair in _CONTRACTIONS.split())


def normalize_answer(text: str) -> str:
    """The answer in lower case, without articles and most punctuation, with digits and apostrophes."""
    words = [NUMBERS.get(word, word) for word in _without_punctuation(_one_line(text)).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """Mean over all ways to leave one of the people's answers out of min(1, equal ones among the others / 3).

    Answers are normalized only if the people's are not all the same: the official code leaves those alone, meant for
    text that is read off the picture. So "Black." is wrong if all ten say "black".

    Raises:
        ValueError: no answers.
    """
    if not answers:
        raise ValueError("vqa_accuracy: expected the answers of people, got none")
    given, people = _one_line(answer), [_one_line(one) for one in answers]
    if len(set(people)) > 1:
        given, people = normalize_answer(given), [normalize_answer(one) for one in people]
    equal = [one == given for one in people]
    return sum(min(1.0, (sum(equal) - left_out) / ENOUGH) for left_out in equal) / len(equal)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """A sign becomes a space, or nothing if it has a space beside it somewhere or a number of the text has a comma."""
    in_number = COMMA_IN_NUMBER.search(text) is not None
    result = text
    for sign in PUNCTUATION:
        apart = f"{sign} " in text or f" {sign}" in text
        result = result.replace(sign, "" if apart or in_number else " ")
    return PERIOD.sub("", result, count=PERIODS)
