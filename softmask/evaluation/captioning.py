"""Scores of generated captions against the true ones: CIDEr, BLEU-4, ROUGE-L and METEOR by pycocoevalcap.

The model's caption is the beam that its two heads together score highest (`rerank` of models/sycoca/generation.py).
Three others are scored for comparison: the best beam by the decoder alone, a random caption of the training set, and
the caption of the training image with the most similar image feature.

With Java, captions are split into words by the PTB tokenizer, as on COCO's server, and METEOR is computed. Without it,
words are runs of letters and digits. The result says which tokenizer was used.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softmask.data import CaptionTokenizer, DataError
from softmask.evaluation import ranks
from softmask.evaluation.one_pass import Encoded, Measure, encode, image_pieces
from softmask.evaluation.readers import Entry, Reader, Scorer
from softmask.models.sycoca.generation import Lengths, generate_captions, search_captions
from softmask.models.sycoca.model import SyCoCa
from softmask.training.config import Config, ConfigError

if TYPE_CHECKING:
    from pycocoevalcap.meteor.meteor import Meteor

LONGEST_PROMPT = 512  # tokens that are looked at; no model has room for as many
JAVA_SECONDS = 600.0  # time limit of one call

Words = dict[int, list[str]]
"""Number of an image -> its captions, words separated by spaces."""


@dataclass(frozen=True)
class CaptionOptions:
    """Options of caption generation and of its comparisons."""

    beams: int = 24
    min_length: int = 0  # generated tokens before [SEP]
    prompt: str = ""  # text that every caption starts with; it is given, and not part of the scored caption
    neighbours: int = 0  # evenly spaced training images among which the nearest is searched; 0: all
    seed: int = 0  # of the random captions


WRITING = ("beams", "min_length", "prompt")
"""Options that change what is written."""


@dataclass
class Captions:
    """Captions of images, in order: the best beam by both heads, and the best by the decoder alone."""

    chosen: list[str] = field(default_factory=list)
    beams_alone: list[str] = field(default_factory=list)

    def add(self, other: Captions) -> None:
        self.chosen += other.chosen
        self.beams_alone += other.beams_alone


@dataclass
class Described:
    """What a piece tells of its images."""

    image_ids: list[int]
    references: list[list[str]]  # of each image
    captions: Captions = field(default_factory=Captions)
    features: Tensor | None = None  # [I, d], normalized, on the CPU; None: images of an earlier piece


class Captioning(Measure[Described]):
    """The metrics.json section: scores of the model, of the decoder alone and, with `training`, of the comparisons.

    Raises:
        ConfigError: the captions' length leaves no room for the minimum or the prompt.
        DataError: no readable sample.
    """

    gallery = True

    def __init__(self, scorer: Scorer, training: Reader | None, options: CaptionOptions) -> None:
        self.scorer, self.training, self.options = scorer, training, options
        caption_limits(scorer.config, scorer.tokenizer, options)

    def look(self, seen: Encoded) -> Described:
        references: list[list[str]] = [[] for _ in seen.first]
        for sample, number in zip(seen.samples, seen.picture, strict=True):
            references[number].append(sample.caption)
        written = write_captions(self.scorer, seen, self.options)
        return Described([one.image_id for one in seen.first], references, written, seen.features.cpu())

    def note(self, entries: Sequence[Entry]) -> Described:
        return Described([one.image_id for one in entries], [[one.caption] for one in entries])

    def result(self, found: Sequence[Described]) -> dict:
        if not found:
            raise DataError("no readable sample to caption")
        options, training = self.options, self.training
        written, references, features = _joined(found)
        given = list(references.values())
        result: dict[str, Any] = {"samples": len(given), "beams": options.beams}
        result |= {name: value for name in ("min_length", "prompt") if (value := getattr(options, name))}
        texts: dict[str, Sequence[str]] = {"chosen": written.chosen}
        texts |= {"beams_alone": written.beams_alone} if options.beams > 1 else {}
        if training is not None:
            numbers = chosen_numbers(len(training.source), options.neighbours)
            nearest, captions = nearest_captions(self.scorer, features, training, numbers)
            result["neighbours"] = len(captions)
            texts |= {"random": Random(options.seed).choices(captions, k=len(given)), "nearest": nearest}
        ((tokenizer, scores),) = ranks.share_out([texts], lambda some: score_all(some, given), show="scoring")
        return result | {"tokenizer": tokenizer} | scores.pop("chosen") | scores


def _joined(found: Sequence[Described]) -> tuple[Captions, dict[int, list[str]], Tensor]:
    """Captions, references by image_id and features of all images."""
    written, references = Captions(), dict[int, list[str]]()
    for one in found:
        for number, texts in zip(one.image_ids, one.references, strict=True):
            references.setdefault(number, []).extend(texts)
        written.add(one.captions)
    return written, references, torch.cat([one.features for one in found if one.features is not None])


def write_captions(scorer: Scorer, seen: Encoded, options: CaptionOptions) -> Captions:
    """Captions of the pictures, in batches small enough that all their beams fit one batch of the scorer.

    Raises:
        ConfigError: the captions' length leaves no room for the minimum or the prompt.
    """
    model, written, beams = scorer.model, Captions(), options.beams
    if not isinstance(model, SyCoCa):
        raise TypeError(f"captioning: expected a SyCoCa model, got {type(model).__name__}")
    limits, decode = caption_limits(scorer.config, scorer.tokenizer, options), scorer.tokenizer.decode
    for tokens in seen.tokens.split(max(1, scorer.batch_size // beams)):
        if beams == 1:
            written.add(Captions(decode(generate_captions(model, tokens, **limits))))
            continue
        found = search_captions(model, tokens, **limits, num_beams=beams)
        written.add(Captions(decode(found.best()), decode(found.captions[:, 0])))
    return written


def caption_limits(config: Config, tokenizer: CaptionTokenizer, options: CaptionOptions) -> dict[str, Any]:
    """max_length, min_length and prompt of the search.

    Raises:
        ConfigError: the captions' length leaves no room for the minimum or the prompt.
    """
    data, prompt = config.data, ()
    if options.prompt:
        length = 1 + LONGEST_PROMPT
        read = tokenizer([options.prompt], max_length=length, append_sep=False, clean=data.clean_captions)
        prompt = tuple(read.input_ids[0, 1:].tolist())
    lengths = {"most": min(data.max_length, config.model.text.max_positions), "least": options.min_length}
    try:
        if options.prompt and not prompt:
            raise ValueError(f"prompt: expected words, got {options.prompt!r}")
        limits = Lengths(**lengths, prompt=prompt)
    except ValueError as error:
        raise ConfigError(f"captions: {error}") from error
    return {"max_length": limits.most, "min_length": limits.least, "prompt": limits.prompt}


# -- comparisons -----------------------------------------------------------------------------------


def chosen_numbers(total: int, wanted: int) -> list[int]:
    """`wanted` evenly spaced numbers of range(total); all of them for 0."""
    if wanted == 0 or total <= wanted:
        return list(range(total))
    return [number * total // wanted for number in range(wanted)]


@torch.no_grad()
def nearest_captions(
    scorer: Scorer, features: Tensor, training: Reader, numbers: Sequence[int]
) -> tuple[list[str], list[str]]:
    """The caption of the most similar training image, of equal ones the first, for each normalized feature [B, d].

    Training features are compared piece by piece and not kept: there may be millions.

    Returns:
        These captions, and one caption of every training image.

    Raises:
        DataError: no readable training sample.
    """
    size, features = scorer.batch_size, features.to(scorer.device)
    similarity = features.new_full((len(features),), -torch.inf)
    place = torch.zeros(len(features), dtype=torch.long, device=features.device)  # piece * size + row

    def look(numbered: tuple[int, list[int]]) -> tuple[dict[int, str], dict[int, str]]:
        piece, indices = numbered
        own = Reader(training.source, training.data)
        samples = list(own.read(indices))
        if not samples:
            return {}, own.skipped
        known = encode(scorer, samples)
        found, row = (features @ known.features.T).max(dim=1)
        place.copy_(torch.where(found > similarity, row + piece * size, place))
        torch.maximum(found, similarity, out=similarity)
        return {piece * size + row: one.caption for row, one in enumerate(known.first)}, own.skipped

    told = ranks.share_out(list(enumerate(image_pieces(training.source, numbers, size))), look, show="training images")
    captions: dict[int, str] = {}
    for some, skipped in told:
        captions |= some
        training.skipped |= skipped
    if not captions:
        raise DataError("no readable training sample to compare captions with")
    of_ranks = ranks.merge({ranks.rank(): (similarity.cpu(), place.cpu())})
    similarities, places = (torch.stack(one) for one in zip(*of_ranks, strict=True))
    first = places.where(similarities == similarities.amax(0), max(captions)).amin(0)
    return [captions[number] for number in first.tolist()], list(captions.values())


# -- scores ----------------------------------------------------------------------------------------


class JavaError(RuntimeError):
    """Java failed or took too long."""


@functools.cache
def has_java() -> bool:
    """Whether a working Java is installed."""
    if shutil.which("java") is None:
        return False
    try:
        return subprocess.run(["java", "-version"], capture_output=True, timeout=JAVA_SECONDS).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def score_all(
    candidates: dict[str, Sequence[str]], references: Sequence[Sequence[str]]
) -> tuple[str, dict[str, dict[str, float]]]:
    """The tokenizer ("ptb" or "words") and the scores of several candidates; if Java fails, the scores without it."""
    if has_java():
        try:
            return "ptb", {name: score(texts, references) for name, texts in candidates.items()}
        except JavaError as error:
            print(f"captions are scored without Java: {error}", file=sys.stderr)
    return "words", {name: score(texts, references, java=False) for name, texts in candidates.items()}


def score(
    candidates: Sequence[str], references: Sequence[Sequence[str]], *, java: bool | None = None
) -> dict[str, float]:
    """Scores of candidates[i] against all references[i]: cider (1.0 is 100 in papers), bleu4, rouge_l and, with Java,
    meteor.

    Raises:
        JavaError: Java fails, or takes longer than JAVA_SECONDS.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    java = has_java() if java is None else java
    written = tokenized([[candidate] for candidate in candidates], java=java)
    given = tokenized(references, java=java)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocoevalcap prints lengths and file names
        result = {
            "cider": Cider().compute_score(given, written)[0],
            "bleu4": Bleu(4).compute_score(given, written, verbose=0)[0][3],
            "rouge_l": Rouge().compute_score(given, written)[0],
        }
    if java:
        result["meteor"] = _meteor_score(given, written)
    return {name: float(value) for name, value in result.items()}


def _meteor_score(given: Words, written: Words) -> float:
    process = meteor()
    watch = threading.Timer(JAVA_SECONDS, process.meteor_p.kill)
    watch.start()
    try:
        return process.compute_score(given, written)[0]
    except (OSError, ValueError, AssertionError) as error:  # no answer, or not a number
        meteor.cache_clear()
        process.meteor_p.kill()
        if process.lock.locked():  # the destructor would wait for it
            process.lock.release()
        raise JavaError(f"METEOR failed ({type(error).__name__}: {error})") from error
    finally:
        watch.cancel()


@functools.cache
def meteor() -> Meteor:
    """One instance for all scores, because its Java process takes seconds to load a table of paraphrases."""
    from pycocoevalcap.meteor.meteor import Meteor

    return Meteor()


def tokenized(captions: Sequence[Sequence[str]], *, java: bool) -> Words:
    """Captions as words without punctuation: by the PTB tokenizer with Java, else runs of letters and digits."""
    rows = [[" ".join(text.split()) for text in row] for row in captions]
    if not java:
        return {i: [" ".join(re.findall(r"\w+", text.lower())) for text in row] for i, row in enumerate(rows)}
    lines = iter(_by_ptb([text for row in rows for text in row]))
    return {i: [next(lines) for _ in row] for i, row in enumerate(rows)}


def _by_ptb(texts: Sequence[str]) -> list[str]:
    """The Stanford tokenizer of pycocoevalcap, with a time limit, which pycocoevalcap's own call lacks."""
    from pycocoevalcap.tokenizer import ptbtokenizer as ptb

    jar = Path(ptb.__file__).with_name(ptb.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    try:
        done = subprocess.run(command, input="\n".join(texts).encode(), capture_output=True, timeout=JAVA_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise JavaError(f"the tokenizer failed ({type(error).__name__}: {error})") from error
    lines = done.stdout.decode("utf-8", "replace").removesuffix("\n").split("\n")
    if done.returncode != 0 or len(lines) != len(texts):
        said = " ".join(done.stderr.decode("utf-8", "replace").split())[-200:]
        raise JavaError(f"the tokenizer exited with {done.returncode} after {len(lines)} of {len(texts)} lines: {said}")
    return [" ".join(word for word in line.split() if word not in ptb.PUNCTUATIONS) for line in lines]
