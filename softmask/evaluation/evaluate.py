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
scored against the true ones beside captions of `--training`, and paints hidden patches again (captioning.py,
reconstruction.py).
Zero-shot classification takes `--classes`, by default the concepts.json beside the data (zero_shot.py).

Unreadable samples are left out and named on stderr. On any failure nothing is written.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import islice
from pathlib import Path
from typing import get_args

from softmask import BackendError
from softmask.data import DataError
from softmask.data.sources import expand_pattern
from softmask.evaluation.captioning import CaptionOptions, captioning
from softmask.evaluation.command import (
    add_data_options,
    check_output,
    count,
    evaluation_facts,
    load_scorer,
    name_skipped,
    open_reader,
    positive,
    sizes,
    write_atomically,
)
from softmask.evaluation.grounding import grounding
from softmask.evaluation.readers import Reader, Scorer
from softmask.evaluation.reconstruction import reconstruction
from softmask.evaluation.retrieval import RerankBy, retrieval
from softmask.evaluation.zero_shot import Class, read_classes, zero_shot
from softmask.training.checkpoint.store import CheckpointError, find_checkpoint, read_json
from softmask.training.config import ConfigError
from softmask.training.failures import explain
from softmask.training.launchers import check_environment


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


def training_facts(checkpoint: Path) -> dict:
    """Seconds and steps of training behind a step_... folder, from its trainer.json."""
    state = read_json(checkpoint / "trainer.json", "seconds", "step")
    return {"seconds": state["seconds"], "steps": state["step"]}


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
