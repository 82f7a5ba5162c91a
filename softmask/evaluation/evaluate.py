"""Evaluate a checkpoint on captioned shards and write metrics.json.

    python train/evaluate.py CHECKPOINT --data 'data/test-*.tar' [--output metrics.json] [--pairs N] [--rerank K]
                             [--rerank-by match|difference|match+itc] [--resize squash|crop] [--gallery device|host]
                             [--training 'data/train-*.tar'] [--neighbours 0] [--beams 24] [--min-length N]
                             [--prompt TEXT] [--classes FILE]

CHECKPOINT is a run's folder (its newest complete checkpoint) or one step_... folder. `--data` is a glob or brace
pattern of WebDataset shards, or a JSON list. The list's paths are relative to the run's `data.image_root`, or to the
list's folder if that is empty.

Retrieval uses the first `--pairs` readable samples (0: all). It reports R@1, R@5 and R@10 in both directions, as
fractions: by cosine similarity of the ITC features, and, if the model has ITM, with the `--rerank` best candidates
re-ranked by it. All captions of an image are right answers.

Grounding uses every sample whose .json lists objects and plays the pointing game with each phrase: does the word's map
peak inside the object's mask? Masks are COCO's uncompressed run lengths (column-major, zeros first) of the stored
image's [height, width]:

    {"caption": "a dodo above a red apple",
     "objects": [{"phrase": "red apple", "span": [15, 24], "mask": {"size": [256, 256], "counts": [1200, 31, ...]}}]}

SyCoCa generates a caption for each image of the first `--pairs` samples, which is scored beside captions of
`--training`, and reconstructs hidden patches (captioning.py, reconstruction.py).

Zero-shot classification uses `--classes`, by default the concepts.json beside the data (zero_shot.py).

Tasks after pre-training (docs/finetuning.md) have a section of their own, and their own files as `--data`. `--task
classification` measures a pre-trained run on folders of classes without training it, `--task grounding` on RefCOCO's
files.

Under torchrun, deepspeed, srun or mpirun every process takes its share of the samples; the figures are the same to the
last digit. Unreadable samples are skipped and named on stderr. If the command fails, it writes nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import get_args

from softmask.arguments import count, positive
from softmask.evaluation import ranks
from softmask.evaluation.captioning import CaptionOptions
from softmask.evaluation.command import (
    add_data_options,
    check_output,
    evaluation_facts,
    finish,
    load_scorer,
    name_skipped,
    open_reader,
    sizes,
    use_answer_list,
)
from softmask.evaluation.readers import Reader, Scorer
from softmask.evaluation.retrieval import RerankBy
from softmask.evaluation.sections import Evaluation, Section, evaluate, for_task, sections_of
from softmask.evaluation.tasks.boxes import BoxScore
from softmask.evaluation.zero_shot import Class, read_classes
from softmask.files import write_atomically
from softmask.tasks.downstream import paths_of
from softmask.training.checkpoint.state import read_state
from softmask.training.checkpoint.store import best_checkpoint
from softmask.training.config import PRETRAIN


def known_classes(data: str, file: Path | None) -> list[Class]:
    """The classes of the file; by default those of the concepts.json beside the data, if present."""
    first = [] if Path(data).is_dir() else paths_of(data)[:1]
    beside = [Path(path).parent / "concepts.json" for path in first]
    files = [file] if file is not None else [path for path in beside if path.is_file()]
    return read_classes(files[0]) if files else []


def training_facts(checkpoint: Path) -> dict:
    """Seconds and steps of training, from the checkpoint's trainer.json."""
    state = read_state(checkpoint)
    return {"seconds": state["seconds"], "steps": state["step"]}


def summary(result: dict, sections: list[Section], given: Evaluation) -> str:
    """The results as lines for the terminal."""
    shown = [section for section in sections if section.name in result]
    return "\n".join(line for section in shown for line in section.lines(result[section.name], given))


def unused(options: argparse.Namespace, result: dict, given: Evaluation) -> list[str]:
    """Messages for options that had no effect."""
    lines = []
    if "itm" not in result.get("retrieval", {}):
        usual = {"rerank": None, "rerank_by": "match", "gallery": "device"}
        in_vain = {name: value for name in usual if (value := getattr(options, name)) != usual[name]}
        lines += [f"--{name.replace('_', '-')} {value}: nothing is re-ranked" for name, value in in_vain.items()]
    frozen = "linear_probe" in result.get("classification", {})
    if options.training and "captioning" not in result and not frozen:
        lines.append("--training: the model generates no captions")
    if options.box_score != "mean" and options.task != "grounding":
        lines.append(f"--box-score {options.box_score}: --task grounding is not measured")
    for name in ("min_length", "prompt"):
        if getattr(options, name) and "captioning" not in result:
            lines.append(f"--{name.replace('_', '-')}: the model generates no captions")
    if options.predictions and not given.predictions:
        lines.append(f"--predictions: {', '.join(result)} makes none")
    if options.classes and "zero_shot" not in result:
        lines.append(f"--classes: no image of {options.data} shows a single object of a class")
    return lines


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate a checkpoint on captioned shards and write metrics.json.")
    parser.add_argument("checkpoint", type=Path, help="a run's folder, or one of its step_... folders")
    add_data_options(parser)
    parser.add_argument("--output", type=Path, help="default: metrics.json in CHECKPOINT, with --blank blank.json")
    parser.add_argument(
        "--pairs",
        type=count,
        help="samples for retrieval and captions; 0: all (default 256; of a run of train/finetune.py all)",
    )
    parser.add_argument(
        "--rerank", type=positive, help="candidates that ITM re-ranks (default 16; of fine-tuned retrieval head.rerank)"
    )
    parser.add_argument(
        "--rerank-by",
        choices=get_args(RerankBy),
        default="match",
        help="logit of a match, as ALBEF (default), minus that of no match, or plus the features' similarity, as BLIP",
    )
    parser.add_argument(
        "--box-score",
        choices=get_args(BoxScore),
        default="mean",
        help="what grounding ranks boxes by: the map's mean (default), or its sum over the root of the area, as ALBEF",
    )
    _add_caption_options(parser)
    parser.add_argument(
        "--classes",
        type=Path,
        help="JSON list of classes for zero-shot classification (default: concepts.json beside the data)",
    )
    parser.add_argument(
        "--task",
        default="",
        help="measure a pre-trained run on this task without training it: classification, by names and, with "
        "--training, by a linear probe; grounding, of SoftMask++",
    )
    parser.add_argument(
        "--predictions", type=Path, help="write a downstream task's predictions, as its server reads them"
    )
    parser.add_argument("--blank", action="store_true", help="grey pictures: what texts tell by themselves")
    # Passed by deepspeed; the environment has it too, with every launcher.
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _add_caption_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--training", help="training data, whose captions are scored for comparison")
    parser.add_argument("--training-image-root", help="--image-root of --training (default: as in training)")
    parser.add_argument(
        "--neighbours",
        type=count,
        default=0,
        help="training images among which the nearest is searched; 0: all (default)",
    )
    parser.add_argument(
        "--beams",
        type=positive,
        default=CaptionOptions.beams,
        help="beams of the caption search (default %(default)s)",
    )
    parser.add_argument(
        "--min-length",
        type=count,
        help="tokens before a caption may end (default 0; of fine-tuned captioning head.min_length)",
    )
    parser.add_argument(
        "--prompt",
        help="text that every caption starts with, and that is not scored (default none; of fine-tuned captioning "
        "head.prompt)",
    )


def _caption_options(options: argparse.Namespace, head: object) -> CaptionOptions:
    given = {name: value for name in ("min_length", "prompt") if (value := getattr(options, name)) is not None}
    heads = {name: getattr(head, name) for name in ("min_length", "prompt") if hasattr(head, name)}
    return CaptionOptions(beams=options.beams, neighbours=options.neighbours, **(heads | given))


def _training(scorer: Scorer, options: argparse.Namespace) -> Reader | None:
    if not options.training:
        return None
    return open_reader(scorer, options.training, options.training_image_root, split="train")


def run(options: argparse.Namespace) -> str:
    """Writes metrics.json. Returns its numbers as text."""
    start = time.perf_counter()
    output = options.output or options.checkpoint / ("blank.json" if options.blank else "metrics.json")
    checkpoint = best_checkpoint(options.checkpoint)
    check_output(output, ".json")
    if options.predictions:
        check_output(options.predictions, ".json", option="--predictions")
        if options.predictions.resolve() == output.resolve():
            raise FileExistsError(f"--predictions: expected another file than --output, got {str(output)!r} for both")
    classes = [] if options.task else known_classes(options.data, options.classes)
    scorer = load_scorer(checkpoint, **sizes(options))
    sections = for_task(scorer, options.task) if options.task else sections_of(scorer)
    scorer.config.data.blank |= options.blank
    use_answer_list(options, scorer)
    pretrained, head = scorer.config.task == PRETRAIN, scorer.config.head
    given = Evaluation(
        scorer=scorer,
        reader=open_reader(scorer, options.data, options.image_root, split=options.split),
        training=_training(scorer, options),
        pairs=(256 if pretrained else 0) if options.pairs is None else options.pairs,
        rerank=options.rerank or getattr(head, "rerank", 16),
        rerank_by=options.rerank_by,
        box_score=options.box_score,
        captions=_caption_options(options, head),
        classes=classes,
        predictions=[] if options.predictions else None,
    )
    try:
        result = evaluate(given, sections)  # on all ranks, which find the same
    finally:
        for one in filter(None, (given.reader, given.training)):
            name_skipped(one)
    if ranks.rank():
        return ""
    for line in unused(options, result, given):
        print(f"not used: {line}", file=sys.stderr)
    result["training"] = training_facts(checkpoint)
    seconds = round(time.perf_counter() - start, 1)
    facts = evaluation_facts(scorer, given.reader, checkpoint)
    blank = {"blank": True} if scorer.config.data.blank else {}
    result["evaluation"] = {"seconds": seconds, "data": options.data} | facts | blank
    written = [output, *([options.predictions] if given.predictions else [])]
    if given.predictions:
        write_atomically(options.predictions, json.dumps(given.predictions) + "\n")
    write_atomically(output, json.dumps(result, indent=2) + "\n")
    return f"{checkpoint.name}\n{summary(result, sections, given)}\nwritten: {', '.join(map(str, written))}"


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    return finish("evaluate", lambda: run(options), smaller="lower --batch-size or --beams")


if __name__ == "__main__":
    sys.exit(main())
