"""Retrieval, word grounding and, of SyCoCa, captions of a checkpoint on captioned shards, as one metrics.json.

    python train/evaluate.py CHECKPOINT --data 'data/test-*.tar' [--output metrics.json] [--pairs 256] [--rerank 16]
                             [--rerank-by match|difference|match+itc] [--resize squash|crop]
                             [--training 'data/train-*.tar'] [--neighbours 0] [--beams 24] [--classes FILE]

CHECKPOINT is a run's folder (its newest complete checkpoint) or one step_... folder. `--data` is a glob or brace
pattern of WebDataset shards, or a JSON list, whose paths are relative to the run's `data.image_root`, or to its folder
where that is empty.

Retrieval takes the first `--pairs` readable samples in the order of the shards (0: all) and reports R@1, R@5 and R@10
both ways, as fractions, by cosine similarity of the ITC features and with the `--rerank` best of them re-ranked by
ITM, where the model has it (SyCoCa has not). Captions of one picture are all right answers.

Grounding takes every sample whose .json holds objects and plays the pointing game with each phrase: does the word's
map peak inside the object's mask? The format, with mask pixels as COCO's uncompressed run lengths (column-major,
starting with the zeros) of the stored picture's [height, width]:

    {"caption": "a dodo above a red apple",
     "objects": [{"phrase": "red apple", "span": [15, 24], "mask": {"size": [256, 256], "counts": [1200, 31, ...]}}]}

SyCoCa has no word maps; it writes a caption of each picture of the first `--pairs` samples, the best of its beams,
scored against the true ones beside captions of `--training`, and paints hidden patches again (train/captioning.py,
train/reconstruction.py).
Zero-shot classification takes `--classes`, by default the concepts.json beside the data (train/zero_shot.py).

Unreadable samples are left out and named on stderr. On any failure nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from softmask import BackendError
from softmask.data import DataError, open_source
from softmask.data.sources import expand_pattern
from softmask.train import metrics, scoring
from softmask.train.captioning import CaptionOptions, captioning
from softmask.train.checkpoint import CheckpointError, find_checkpoint, load_model, read_json
from softmask.train.config import ConfigError
from softmask.train.failures import explain
from softmask.train.launchers import check_environment
from softmask.train.reconstruction import reconstruction
from softmask.train.scoring import Reader, RerankBy, Sample, Scorer, Word
from softmask.train.zero_shot import Class, read_classes, zero_shot

MAP_KINDS = {"pointing": "gradcam", "attention": "attention"}  # key of metrics.json -> kind of map


def retrieval(scorer: Scorer, samples: Iterable[Sample], *, rerank: int, by: RerankBy = "match") -> dict:
    """R@1/5/10 both ways by ITC and by ITM re-ranking, with the gallery's size and the chance level."""
    gallery = scoring.build_gallery(scorer, samples)
    ranking = scoring.rank_both_ways(scorer, gallery, rerank=rerank, by=by)
    result = {
        "samples": len(gallery.captions),
        "images": len(gallery.pictures),
        "cut": gallery.cut,
        "itc": {way: metrics.recall(rank.itc, rank.relevant) for way, rank in ranking.items()},
        "chance": {way: metrics.chance_recall(rank.relevant) for way, rank in ranking.items()},
    }
    if all(rank.itm is not None for rank in ranking.values()):
        result |= {"rerank": rerank, "rerank_by": by}
        result["itm"] = {way: metrics.recall(rank.itm, rank.relevant) for way, rank in ranking.items()}
    return result


@dataclass
class Tally:
    """Counts of the pointing game. A random point's expected hits are the masks' shares of the picture."""

    samples: int = 0
    words: int = 0
    truncated: int = 0  # phrases that the caption's truncation cut off
    hidden: int = 0  # objects without a visible pixel: no point could hit them
    random: float = 0.0
    pointing: int = 0
    attention: int = 0

    def usable(self, words: list[Word]) -> list[Word]:
        """The words that can be played, counting them and the others."""
        kept = [word for word in words if word.tokens and word.mask.any()]
        self.truncated += sum(not word.tokens for word in words)
        self.hidden += sum(bool(word.tokens) and not word.mask.any() for word in words)
        self.samples += bool(kept)
        self.words += len(kept)
        self.random += sum(word.mask.double().mean().item() for word in kept)
        return kept

    def result(self) -> dict:
        shares = {key: getattr(self, key) / self.words for key in ("pointing", "random", "attention")}
        counts = {key: getattr(self, key) for key in ("words", "samples", "truncated", "hidden")}
        return shares | counts


def count_hits(scorer: Scorer, samples: list[Sample], words: list[list[Word]], tally: Tally) -> None:
    for key, kind in MAP_KINDS.items():
        hits = 0
        for maps, row in zip(scoring.word_maps(scorer, samples, words, kind=kind), words, strict=True):
            for patches, word in zip(maps, row, strict=True):
                plane = metrics.upsample_maps(patches[None], scorer.model.patch_grid, tuple(word.mask.shape))[0]
                hits += metrics.pointing_hit(plane, word.mask)
        setattr(tally, key, getattr(tally, key) + hits)


def grounding(scorer: Scorer, samples: Iterable[Sample]) -> dict | None:
    """The pointing game over all samples with objects; None where no phrase can be played."""
    tally = Tally()
    with_objects = (sample for sample in samples if sample.objects)
    for batch in tqdm(scoring.batches(with_objects, scorer.batch_size), desc="grounding", disable=None, leave=False):
        offsets = scorer.tokens([sample.caption for sample in batch]).offsets
        words = [tally.usable(scoring.phrases(s, spans)) for s, spans in zip(batch, offsets, strict=True)]
        played = [(sample, row) for sample, row in zip(batch, words, strict=True) if row]
        if played:
            count_hits(scorer, [sample for sample, _ in played], [row for _, row in played], tally)
    return tally.result() if tally.words else None


def evaluate(scorer: Scorer, reader: Reader, *, pairs: int, rerank: int, by: RerankBy = "match") -> dict:
    """The "retrieval" and "grounding" sections; the latter is absent where the data has no objects or the model no
    maps."""
    result = {"retrieval": retrieval(scorer, islice(reader.all(), pairs or None), rerank=rerank, by=by)}
    words = grounding(scorer, reader.all()) if hasattr(scorer.model, "word_maps") else None
    return result | ({"grounding": words} if words else {})


def generation(
    scorer: Scorer, reader: Reader, training: Reader | None, *, pairs: int, captions: CaptionOptions
) -> dict:
    """The "captioning" and "reconstruction" sections, of a model that learned to write and to paint."""
    if not hasattr(scorer.model, "caption_decoder"):
        return {}
    result, learned = {}, scorer.config.model
    if learned.tells:
        result["captioning"] = captioning(scorer, islice(reader.all(), pairs or None), training, captions)
    if learned.paints:
        result["reconstruction"] = reconstruction(scorer, islice(reader.all(), pairs or None))
    return {name: section for name, section in result.items() if section}


def known_classes(data: str, file: Path | None) -> list[Class]:
    """Of the file; else of the concepts.json beside the data, if there is one."""
    beside = [Path(path).parent / "concepts.json" for path in expand_pattern(data)[:1]]
    files = [file] if file is not None else [path for path in beside if path.is_file()]
    return read_classes(files[0]) if files else []


def load_scorer(
    checkpoint: Path, *, batch_size: int, text_length: int = 0, image_size: int = 0, resize: str = ""
) -> Scorer:
    """The checkpoint's model on the GPU where there is one, else on the CPU; 0 and "": as in training."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, config = load_model(checkpoint, device=device, image_size=image_size)
    longest = config.model.text.max_positions
    if not 3 <= (length := text_length or config.data.max_length) <= longest:
        raise ConfigError(f"--text-length: expected 3 to {longest} (model.text.max_positions), got {length}")
    config.data.max_length = length
    config.data.eval_resize = resize or config.data.eval_resize
    return Scorer(model, tokenizer, config, device=device, batch_size=batch_size)


def sizes(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `load_scorer`."""
    return {name: getattr(options, name) for name in ("batch_size", "text_length", "image_size", "resize")}


def open_reader(scorer: Scorer, data: str, image_root: str | None = None) -> Reader:
    """Shards, or a JSON list, whose pictures lie in `image_root`; None: where those of training did."""
    root = scorer.config.data.image_root if image_root is None else image_root
    return Reader(open_source(data, image_root=root), scorer.config.data)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """What evaluation and report may read otherwise than training did."""
    parser.add_argument("--data", required=True, help="glob or brace pattern of shards, or a JSON list")
    parser.add_argument(
        "--image-root", help="folder of a JSON list's pictures; '': the list's own (default: training's)"
    )
    parser.add_argument("--text-length", type=count, default=0, help="tokens of a caption; 0: training's (default)")
    parser.add_argument("--image-size", type=count, default=0, help="side of a picture; 0: training's (default)")
    parser.add_argument(
        "--resize",
        choices=("squash", "crop"),
        default="",
        help="whole pictures made square, or the middle of them (default: data.eval_resize, by the method's base)",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=64, help="pictures, captions, beams or pairs at a time (default 64)"
    )


def evaluation_facts(scorer: Scorer, reader: Reader, checkpoint: Path) -> dict:
    """What was evaluated, and how it was read: a report of the same says so."""
    data = scorer.config.data
    read = {"text_length": data.max_length, "image_size": data.image_size, "resize": data.eval_resize}
    return {"checkpoint": checkpoint.name, "digest": reader.source.digest, **read}


def training_facts(checkpoint: Path) -> dict:
    """Seconds and steps of training behind a step_... folder, from its trainer.json."""
    state = read_json(checkpoint / "trainer.json", "seconds", "step")
    return {"seconds": state["seconds"], "steps": state["step"]}


def write_atomically(path: Path, text: str) -> None:
    """Either the whole text or the file as it was before."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_output(path: Path) -> None:
    """Before the work, not after it: can the file be written at all?"""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--output: no folder {str(path.parent)!r}")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"--output: cannot write into {str(path.parent)!r}")
    if path.is_dir():
        raise IsADirectoryError(f"--output: expected a file, got the folder {str(path)!r}")


def name_skipped(reader: Reader) -> None:
    for line in reader.skipped.values():
        print(f"left out: {line}", file=sys.stderr)
    for where, reason in list(reader.bad_objects.items())[:1]:
        count = len(reader.bad_objects)
        print(f"left out: {count} objects that cannot be used, the first: {where}: {reason}", file=sys.stderr)


def summary(result: dict) -> str:
    """The numbers in a few lines for the terminal."""
    section = result["retrieval"]
    lines = [f"retrieval among {section['images']} pictures and {section['samples']} captions, R@1 / R@5 / R@10:"]
    if section["cut"]:
        length = result["evaluation"]["text_length"]
        lines.append(f"  {section['cut']} captions have more than the {length} tokens that are read of them")
    for stage in [name for name in ("itc", "itm", "chance") if name in section]:
        for way in ("i2t", "t2i"):
            shares = " / ".join(f"{100 * value:5.1f}" for value in section[stage][way].values())
            lines.append(f"  {stage:6s} {way}  {shares} %")
    if "grounding" in result:
        section = result["grounding"]
        shares = ", ".join(f"{key} {100 * section[key]:.1f} %" for key in ("pointing", "attention", "random"))
        lines.append(f"pointing game with {section['words']} phrases: {shares}")
    return "\n".join(lines + generation_summary(result))


def generation_summary(result: dict) -> list[str]:
    lines = []
    if "captioning" in result:
        section = result["captioning"]
        lines.append(f"captions of {section['samples']} pictures, CIDEr / BLEU-4 / ROUGE-L:")
        others = {key.replace("_", " "): section.get(key) for key in ("beams_alone", "nearest", "random")}
        for name, scores in {"model": section, **others}.items():
            if scores:
                shares = " / ".join(f"{100 * scores[key]:5.1f}" for key in ("cider", "bleu4", "rouge_l"))
                lines.append(f"  {name:11s} {shares}")
    if "reconstruction" in result:
        section = result["reconstruction"]
        interval = f"{section['gap']:.4f} [{section['low']:.4f}, {section['high']:.4f}]"
        lines.append(f"error of hidden patches {section['right']:.4f}, more by a wrong caption: {interval}")
    if "zero_shot" in result:
        section = result["zero_shot"]
        shares = f"top-1 {100 * section['top1']:.1f} %, top-5 {100 * section['top5']:.1f} %"
        lines.append(f"zero-shot, {section['samples']} pictures of {section['classes']} classes: {shares}")
    return lines


def count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {number}")
    return number


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Retrieval and word grounding of a checkpoint on captioned shards.")
    parser.add_argument("checkpoint", type=Path, help="a run's folder or one of its step_... folders")
    add_data_options(parser)
    parser.add_argument("--output", type=Path, help="default: metrics.json in CHECKPOINT")
    parser.add_argument("--pairs", type=count, default=256, help="size of the retrieval gallery; 0: all (default 256)")
    parser.add_argument("--rerank", type=positive, default=16, help="candidates that ITM re-ranks (default 16)")
    parser.add_argument(
        "--rerank-by", choices=get_args(RerankBy), default="match",
        help="logit of a match, as ALBEF (default), minus that of none, or plus the features' similarity, as BLIP",
    )  # fmt: skip
    parser.add_argument("--training", help="shards of training captions that generated ones are compared with")
    parser.add_argument("--training-image-root", help="as --image-root, of --training (default: training's)")
    parser.add_argument(
        "--neighbours", type=count, default=0, help="how many of them may be the nearest; 0: all (default)"
    )
    parser.add_argument(
        "--beams", type=positive, default=CaptionOptions.beams, help="of the search for captions (default %(default)s)"
    )
    parser.add_argument("--classes", type=Path, help="JSON list for zero-shot classification")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> dict:
    start = time.perf_counter()
    output = options.output or options.checkpoint / "metrics.json"
    checkpoint = find_checkpoint(options.checkpoint)
    check_output(output)
    classes = known_classes(options.data, options.classes)
    scorer = load_scorer(checkpoint, **sizes(options))
    reader = open_reader(scorer, options.data, options.image_root)
    training = open_reader(scorer, options.training, options.training_image_root) if options.training else None
    try:
        result = evaluate(scorer, reader, pairs=options.pairs, rerank=options.rerank, by=options.rerank_by)
        captions = CaptionOptions(beams=options.beams, neighbours=options.neighbours)
        result |= generation(scorer, reader, training, pairs=options.pairs, captions=captions)
        classified = zero_shot(scorer, reader.all(), classes) if classes else None
        result |= {"zero_shot": classified} if classified else {}
    finally:
        for one in filter(None, (reader, training)):
            name_skipped(one)
    result["training"] = training_facts(checkpoint)
    seconds = round(time.perf_counter() - start, 1)
    result["evaluation"] = {"seconds": seconds, "data": options.data} | evaluation_facts(scorer, reader, checkpoint)
    write_atomically(output, json.dumps(result, indent=2) + "\n")
    return result | {"output": str(output)}


def main(argv: list[str] | None = None) -> int:
    try:
        options = parse(argv)
        check_environment()
        result = run(options)
    except (DataError, CheckpointError, ConfigError, BackendError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if (line := explain(error, smaller="lower --batch-size")) is None:
            raise
        print(f"evaluate: {line}", file=sys.stderr)
        return 1
    print(summary(result))
    print(f"written: {result['output']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
