"""What the tasks after pre-training are compared with, on the embedded scenes.

Every task is trained from a demo's run, and for as many steps from random weights (`scratch`), from random weights with
the steps that pre-training took besides (`longer`) and with grey pictures (`text`). All runs that start from a demo
with the same seed share it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.studies.study import Evaluations, Figure, Row, Study, mean_recall, section_figure

CONFIGS = Path("train/configs")
TASKS = CONFIGS / "demo_tasks"
TEST = "test"
UNTRAINED = ("train.steps=1", "optimizer.lr=1.0e-30", "optimizer.min_lr=0.0", "optimizer.warmup_steps=0")
CAPTIONS = ("--data", "data/tasks/captions.json", "--pairs", "1280")
ASSIGNED = (
    "Before every row, also text alone, comes text assignment with pictures (`text_assignment.yaml`); from scratch, "
    "it is what starts from random weights."
)
LONGER = 3  # times the steps: pre-training takes about twice as long as a task


def evaluation(*options: str) -> Evaluations:
    return {TEST: options}


def bases() -> Study:
    """The runs that others start from."""
    rows = [
        Row("demo", "SoftMask++'s demo"),
        Row("untrained", "The same, not trained", UNTRAINED),
        Row("sycoca_demo", "SyCoCa's demo", config=CONFIGS / "sycoca_demo.yaml"),
        Row("sycoca_untrained", "The same, not trained", UNTRAINED, config=CONFIGS / "sycoca_demo.yaml"),
        Row("assigned", "Text assignment", script="finetune", config=TASKS / "text_assignment.yaml", init="bases/demo"),
    ]
    rows.append(replace(rows[-1], name="assigned_scratch", init="bases/untrained"))
    return Study("bases", "", "", CONFIGS / "demo.yaml", evaluation(*CAPTIONS), tuple(rows), shown=False)


def against(task: str, *, init: str, untrained: str, steps: int, blank: bool) -> list[Row]:
    """The task's own row, and those from random weights and with grey pictures."""
    tuned = Row(task, "pre-trained", init=f"bases/{init}", script="finetune")
    scratch = replace(tuned, name=f"{task}_scratch", title="from scratch", init=f"bases/{untrained}", base=task)
    longer = replace(
        scratch, name=f"{task}_longer", title="from scratch, longer", overrides=(f"train.steps={LONGER * steps}",)
    )
    text = replace(tuned, name=f"{task}_text", title="text alone", overrides=("data.blank=true",), base=task)
    return [tuned, scratch, longer, *([text] if blank else [])]


def labels(
    task: str, title: str, *, note: str = "", init: str = "demo", untrained: str = "untrained", steps: int = 1000
) -> Study:
    """A task whose metric is its accuracy."""
    figures: dict[str, Figure] = {
        "accuracy": section_figure(TEST, task, "accuracy"),
        "with something unseen": section_figure(TEST, task, "unseen", "accuracy"),
        "most frequent answer": section_figure(TEST, task, "majority"),
    }
    data = f"data/tasks/{task}_test_*.json" if task == "vqa" else f"data/tasks/{task}_test.json"
    rows = against(task, init=init, untrained=untrained, steps=steps, blank=True)
    return Study(task, title, note, TASKS / f"{task}.yaml", evaluation("--data", data), tuple(rows), figures)


def retrieval() -> Study:
    rows = against("retrieval", init="demo", untrained="untrained", steps=1000, blank=False)
    zero_shot = Row("retrieval_zero_shot", "zero-shot", init="bases/demo", script=None, base="retrieval")
    continued = Row(
        "retrieval_continued", "pre-training continued", ("train.steps=1000", "model.contrast_steps=0"),
        base="retrieval", config=CONFIGS / "demo.yaml", init="bases/demo",
    )  # fmt: skip
    figures: dict[str, Figure] = {
        "mR by ITC": mean_recall(TEST),
        "mR by ITM": mean_recall(TEST, "itm"),
        "R@1, image to caption, by ITM": section_figure(TEST, "retrieval", "itm", "i2t", "r1"),
        "R@1, caption to image, by ITM": section_figure(TEST, "retrieval", "itm", "t2i", "r1"),
    }
    tests = evaluation(*CAPTIONS)
    return Study("retrieval", "Retrieval", "", TASKS / "retrieval.yaml", tests, (*rows, zero_shot, continued), figures)


def captioning() -> Study:
    rows = against("captioning", init="sycoca_demo", untrained="sycoca_untrained", steps=1000, blank=False)
    before = Row("captioning_before", "pre-training alone", init="bases/sycoca_demo", script=None, base="captioning")
    continued = Row(
        "captioning_continued", "pre-training continued", ("train.steps=1000",),
        base="captioning", config=CONFIGS / "sycoca_demo.yaml", init="bases/sycoca_demo",
    )  # fmt: skip
    names = {"CIDEr": "cider", "BLEU-4": "bleu4", "METEOR": "meteor", "ROUGE-L": "rouge_l"}
    figures = {title: section_figure(TEST, "captioning", key) for title, key in names.items()}
    tests = evaluation(*CAPTIONS, "--beams", "4")
    rows = [*rows, before, continued]
    return Study("captioning", "Captioning", "", TASKS / "captioning.yaml", tests, tuple(rows), figures)


def classification() -> Study:
    rows = against("classification", init="demo", untrained="untrained", steps=1000, blank=False)
    data, training = "data/tasks/classification/test", "data/tasks/classification/train"
    frozen = Row(
        "classification_frozen", "frozen", init="bases/demo", script=None, base="",
        evaluations=evaluation("--data", data, "--task", "classification", "--training", training),
    )  # fmt: skip
    figures: dict[str, Figure] = {
        "top-1": section_figure(TEST, "classification", "top1"),
        "top-5": section_figure(TEST, "classification", "top5"),
        "linear probe, top-1": section_figure(TEST, "classification", "linear_probe", "top1"),
        "zero-shot, top-1": section_figure(TEST, "classification", "zero_shot", "top1"),
    }
    tests, config = evaluation("--data", data), TASKS / "classification.yaml"
    return Study("classification", "Classification", "", config, tests, (*rows, frozen), figures)


STUDIES = (
    bases(),
    labels("snli_ve", "SNLI-VE"),
    labels("vqa", "VQA", steps=600),
    labels("nlvr2", "NLVR2", note=ASSIGNED, init="assigned", untrained="assigned_scratch", steps=500),
    retrieval(),
    classification(),
    captioning(),
)
