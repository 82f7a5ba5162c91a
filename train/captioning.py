"""Generated captions against those people gave: CIDEr, BLEU-4, ROUGE-L and METEOR by pycocoevalcap.

Beside the model stand two that write nothing themselves: a caption of the training set drawn at random, and the caption
of the training picture that looks most alike to the image encoder.

Captions are split into words by the PTB tokenizer, as COCO's server does, where there is Java, which METEOR needs too;
else into runs of letters and digits. The result names which.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from tqdm import tqdm

from softmask.data import DataError
from softmask.models.generation import generate_captions
from softmask.train.scoring import Reader, Sample, Scorer, batches, pixels

Words = dict[int, list[str]]
"""Number of a picture -> its captions, words separated by blanks."""


@dataclass(frozen=True)
class CaptionOptions:
    """How captions are made and what they are compared with."""

    beams: int = 3
    neighbours: int = 10_000  # training pictures that the nearest is sought among, spread evenly; 0: all
    seed: int = 0  # of the captions drawn at random


def captioning(scorer: Scorer, samples: Iterable[Sample], training: Reader | None, options: CaptionOptions) -> dict:
    """The metrics.json section: scores of the model and, where `training` is given, of both comparisons."""
    pictures, references = grouped(samples)
    result = {"samples": len(pictures), "beams": options.beams, "tokenizer": "ptb" if has_java() else "words"}
    result |= score(write_captions(scorer, pictures, beams=options.beams), references)
    if training is not None:
        numbers = chosen_numbers(len(training.source), options.neighbours)
        features, captions = known_pictures(scorer, training, numbers)
        drawn = Random(options.seed).choices(captions, k=len(pictures))
        result["random"] = score(drawn, references)
        result["nearest"] = score(nearest(scorer, pictures, features, captions), references)
    return result


def grouped(samples: Iterable[Sample]) -> tuple[list[Sample], list[list[str]]]:
    """Every picture once, and all captions of each."""
    pictures: dict[int, Sample] = {}
    captions: dict[int, list[str]] = {}
    for sample in samples:
        pictures.setdefault(sample.image_id, sample)
        captions.setdefault(sample.image_id, []).append(sample.caption)
    if not pictures:
        raise DataError("no readable sample to caption")
    return list(pictures.values()), list(captions.values())


def write_captions(scorer: Scorer, samples: Sequence[Sample], *, beams: int) -> list[str]:
    """What the model says of each picture."""
    written = []
    length = min(scorer.config.data.max_length, scorer.config.model.text.max_positions)
    for batch in tqdm(list(batches(samples, scorer.batch_size)), desc="captioning", disable=None, leave=False):
        ids = generate_captions(scorer.model, pixels(scorer, batch), max_length=length, num_beams=beams)
        written += scorer.tokenizer.decode(ids)
    return written


# -- comparisons -----------------------------------------------------------------------------------


def chosen_numbers(total: int, wanted: int) -> list[int]:
    """`wanted` numbers spread over range(total); all of them for 0."""
    if wanted == 0 or total <= wanted:
        return list(range(total))
    return [number * total // wanted for number in range(wanted)]


@torch.no_grad()
def known_pictures(scorer: Scorer, training: Reader, numbers: Sequence[int]) -> tuple[Tensor, list[str]]:
    """Normalized features [N, d] and captions of training samples."""
    features, captions = [], []
    found = batches(training.read(numbers), scorer.batch_size)
    for batch in tqdm(found, desc="training pictures", disable=None, leave=False):
        features.append(scorer.model.encode_image(pixels(scorer, batch))[1])
        captions += [sample.caption for sample in batch]
    if not captions:
        raise DataError("no readable training sample to compare captions with")
    return torch.cat(features), captions


@torch.no_grad()
def nearest(scorer: Scorer, samples: Sequence[Sample], features: Tensor, captions: Sequence[str]) -> list[str]:
    """For each picture the caption of the training picture whose feature is most similar."""
    found = []
    for batch in batches(samples, scorer.batch_size):
        _, feature = scorer.model.encode_image(pixels(scorer, batch))
        found += [captions[best] for best in (feature @ features.T).argmax(dim=1).tolist()]
    return found


# -- scores ----------------------------------------------------------------------------------------


def has_java() -> bool:
    return shutil.which("java") is not None


def score(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """candidates[i] against all references[i]: cider (1.0 is 100 in papers), bleu4, rouge_l and, with Java, meteor."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    written = tokenized([[candidate] for candidate in candidates])
    given = tokenized(references)
    with contextlib.redirect_stdout(io.StringIO()):  # they report lengths and file names
        result = {
            "cider": Cider().compute_score(given, written)[0],
            "bleu4": Bleu(4).compute_score(given, written, verbose=0)[0][3],
            "rouge_l": Rouge().compute_score(given, written)[0],
        }
        if has_java():
            from pycocoevalcap.meteor.meteor import Meteor

            result["meteor"] = Meteor().compute_score(given, written)[0]
    return {name: float(value) for name, value in result.items()}


def tokenized(captions: Sequence[Sequence[str]]) -> Words:
    """Words without punctuation, by PTB where there is Java."""
    if not has_java():
        return {i: [" ".join(re.findall(r"\w+", text.lower())) for text in row] for i, row in enumerate(captions)}
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    return PTBTokenizer().tokenize({i: [{"caption": t} for t in row] for i, row in enumerate(captions)})
