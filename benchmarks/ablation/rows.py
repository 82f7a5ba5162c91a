"""The rows of both ablations: their overrides of a demo's configuration, what is measured, and the expected order.

A row sets every key in which the rows of its study differ, even to its configuration's value, so that a change of
the configuration cannot make two rows equal. All other settings are those of the study's configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from statistics import fmean

CONFIGS = Path(__file__).resolve().parents[2] / "train" / "configs"
Pairs = tuple[tuple[str, str], ...]


class AblationError(RuntimeError):
    """A run failed or is unusable; the message names it."""


@dataclass(frozen=True)
class Row:
    """One configuration of a study."""

    name: str  # folder name, and value of --rows
    title: str
    overrides: tuple[str, ...]  # key=value, of the study's configuration
    published: tuple[float, ...] = ()  # the paper's values in percent, one per figure of the study


@dataclass(frozen=True)
class Study:
    """The rows of one table. `order` lists for each figure the pairs (lower, higher) of row names that are expected."""

    method: str
    title: str
    note: str
    config: Path
    rows: tuple[Row, ...]
    figures: dict[str, Callable[[dict], float]]  # title -> value as a fraction, read from metrics.json
    order: dict[str, Pairs]
    order_name: str  # used in a sentence
    beside: dict[str, Callable[[dict], float | None]] = field(
        default_factory=dict
    )  # no expected order; None: not measured


def mean_recall(way: str) -> Callable[[dict], float]:
    """The mean of R@1, R@5 and R@10 by ITC; `way` is i2t or t2i."""
    return lambda metrics: fmean(metrics["retrieval"]["itc"][way].values())


def reranked(way: str) -> Callable[[dict], float]:
    """R@1 after re-ranking by ITM."""
    return lambda metrics: metrics["retrieval"]["itm"][way]["r1"]


def section_figure(section: str, key: str) -> Callable[[dict], float | None]:
    """A value of a section that some rows lack."""
    return lambda metrics: metrics.get(section, {}).get(key)


def published_order(rows: tuple[Row, ...], figures: dict[str, Callable[[dict], float]]) -> dict[str, Pairs]:
    """All pairs of rows in the order of the published figures."""
    return {
        title: tuple(
            (low.name, high.name) for low, high in permutations(rows, 2) if low.published[i] < high.published[i]
        )
        for i, title in enumerate(figures)
    }


MEAN_RECALLS = {"mTR": mean_recall("i2t"), "mIR": mean_recall("t2i")}

SYCOCA_ROWS = (
    Row(
        "itc",
        "ITC",
        ("model.weights.caption=0", "model.caption_masking=none", "model.masks=attentive", "model.reconstruct=false"),
        (13.5, 14.8),
    ),
    Row(
        "coca",
        "CoCa (ITC + IC)",
        ("model.weights.caption=2", "model.caption_masking=none", "model.masks=attentive", "model.reconstruct=false"),
        (16.1, 16.0),
    ),
    Row(
        "attentive_ic",
        "CoCa + attentive masking on IC",
        ("model.weights.caption=2", "model.caption_masking=tokens", "model.masks=attentive", "model.reconstruct=false"),
        (17.5, 18.3),
    ),
    Row(
        "random_tgmim",
        "CoCa + TG-MIM with random masks",
        ("model.weights.caption=2", "model.caption_masking=none", "model.masks=random", "model.reconstruct=true"),
        (14.4, 15.2),
    ),
    Row(
        "sycoca",
        "SyCoCa",
        ("model.weights.caption=2", "model.caption_masking=tokens", "model.masks=attentive", "model.reconstruct=true"),
        (18.3, 18.4),
    ),
)

SOFTMASK_PP_ROWS = (
    Row("albef", "ALBEF", ("model.soft_mask=false", "model.gamma=0", "model.mask_text=mlm", "data.distort=false")),
    Row(
        "soft_mask",
        "ALBEF + soft mask",
        ("model.soft_mask=true", "model.gamma=0", "model.mask_text=mlm", "data.distort=false"),
    ),
    Row(
        "focal",
        "ALBEF + focal",
        ("model.soft_mask=false", "model.gamma=1", "model.mask_text=mlm", "data.distort=false"),
    ),
    Row(
        "augmentation",
        "ALBEF + multi-modal augmentation",
        ("model.soft_mask=false", "model.gamma=0", "model.mask_text=all", "data.distort=true"),
    ),
    Row(
        "all",
        "SoftMask++ (all)",
        ("model.soft_mask=true", "model.gamma=1", "model.mask_text=all", "data.distort=true"),
    ),
)
SOFTMASK_PP_FIGURES = MEAN_RECALLS | {
    "TR@1, ITM": reranked("i2t"),
    "IR@1, ITM": reranked("t2i"),
    "pointing game": lambda metrics: metrics["grounding"]["pointing"],
}
ADDITIONS = (
    ("albef", "soft_mask"),
    ("albef", "focal"),
    ("albef", "augmentation"),
    ("soft_mask", "all"),
    ("focal", "all"),
    ("augmentation", "all"),
    ("albef", "all"),
)

STUDIES = (
    Study(
        method="sycoca",
        title="SyCoCa",
        note=(
            "All rows use the demo's weight 2 of ITC (the paper has 1) and its focal factor, gamma 1; CoCa is trained "
            "without a pooler. The paper's rows are interpreted as follows: with attentive masking on IC, the caption "
            "decoder sees the half of the patches that are most similar to a token of the caption; TG-MIM with random "
            "masks reconstructs random patches, and the caption decoder sees the whole image. The paper's figures are "
            "zero-shot retrieval on COCO after training on CC3M. CIDEr scores captions generated from the whole image "
            "in every row, chosen by both heads as in evaluation. The gap is the increase of the error of hidden "
            "patches, chosen as in the row's training, when they are reconstructed with another image's caption. Both "
            "are multiplied by 100. Attentive masks depend on the right caption and random ones do not, so their gaps "
            "are of different patches and comparable only roughly."
        ),
        config=CONFIGS / "sycoca_demo.yaml",
        rows=SYCOCA_ROWS,
        figures=MEAN_RECALLS,
        order=published_order(SYCOCA_ROWS, MEAN_RECALLS),
        order_name="the paper's order",
        beside={"CIDEr": section_figure("captioning", "cider"), "gap": section_figure("reconstruction", "gap")},
    ),
    Study(
        method="softmask_pp",
        title="SoftMask++",
        note=(
            "Each of the three middle rows adds one thing to ALBEF, the last adds all three. Multi-modal "
            "augmentation means masked captions for every loss and distorted images, as strong as at full size, which "
            "at this size halves the speed of learning; the demo's distortions are milder "
            "([demo.md](../../docs/demo.md)). All rows, including ALBEF, use the demo's other settings of that day: no "
            "queue, no soft targets, ITC at weight 2 and MLM at 0.25, only the contrastive loss for the first steps, "
            "easy negatives, no RandAugment. No figures are published for single additions, so the expected order is "
            "our reading of the paper: no addition lowers a figure."
        ),
        config=Path(__file__).with_name("softmask_pp.yaml"),
        rows=SOFTMASK_PP_ROWS,
        figures=SOFTMASK_PP_FIGURES,
        order=dict.fromkeys(SOFTMASK_PP_FIGURES, ADDITIONS),
        order_name="our reading of the paper, that no addition lowers a figure",
    ),
)
