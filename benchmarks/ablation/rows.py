"""The rows of both ablations: their overrides of a study's configuration, and what is measured.

A row sets every key in which the rows of its study differ, even to its configuration's value, so that a change of
the configuration cannot make two rows equal. All other settings are those of the study's configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

CONFIGS = Path(__file__).parent
UNSEEN, SEEN = "unseen", "seen"  # the artist that training never sees, and the artists of training
Measured = Mapping[str, dict]  # UNSEEN or SEEN -> contents of metrics.json
Figure = Callable[[Measured], float | None]  # a fraction; None: not measured


class AblationError(RuntimeError):
    """A run failed or is unusable; the message names it."""


@dataclass(frozen=True)
class Row:
    """One configuration of a study."""

    name: str  # folder name, and value of --rows
    title: str
    overrides: tuple[str, ...]  # key=value, of the study's configuration
    base: str = ""  # name of the row without the part that this one adds
    published: tuple[float, ...] = ()  # the paper's values in percent, one per title in the study's `published`


@dataclass(frozen=True)
class Study:
    """The rows of one table."""

    method: str
    title: str
    note: str
    config: Path
    rows: tuple[Row, ...]
    figures: dict[str, Figure]  # title -> value, read from a run's metrics
    published: tuple[str, ...] = ()  # the paper's figures


def mean_recall(hand: str) -> Figure:
    """The mean of R@1, R@5 and R@10 by ITC, image to caption and caption to image."""
    return lambda measured: fmean(
        share for way in measured[hand]["retrieval"]["itc"].values() for share in way.values()
    )


def first_recall(hand: str, stage: str) -> Figure:
    """The mean of R@1 image to caption and caption to image; `stage` is itc, or itm for re-ranked results."""
    return lambda measured: fmean(way["r1"] for way in measured[hand]["retrieval"][stage].values())


def section_figure(hand: str, section: str, key: str) -> Figure:
    """A value of a section that some rows lack."""
    return lambda measured: measured[hand].get(section, {}).get(key)


SYCOCA_ROWS = (
    Row(
        "itc",
        "ITC",
        ("model.weights.caption=0", "model.caption_masking=none", "model.masks=attentive", "model.reconstruct=false"),
        published=(13.5, 14.8),
    ),
    Row(
        "coca",
        "CoCa (ITC + IC)",
        ("model.weights.caption=2", "model.caption_masking=none", "model.masks=attentive", "model.reconstruct=false"),
        base="itc",
        published=(16.1, 16.0),
    ),
    Row(
        "attentive_ic",
        "CoCa + attentive masking on IC",
        ("model.weights.caption=2", "model.caption_masking=tokens", "model.masks=attentive", "model.reconstruct=false"),
        base="coca",
        published=(17.5, 18.3),
    ),
    Row(
        "random_tgmim",
        "CoCa + TG-MIM with random masks",
        ("model.weights.caption=2", "model.caption_masking=none", "model.masks=random", "model.reconstruct=true"),
        base="coca",
        published=(14.4, 15.2),
    ),
    Row(
        "sycoca",
        "SyCoCa",
        ("model.weights.caption=2", "model.caption_masking=tokens", "model.masks=attentive", "model.reconstruct=true"),
        base="coca",
        published=(18.3, 18.4),
    ),
)

SOFTMASK_PP_ROWS = (
    Row("albef", "ALBEF", ("model.soft_mask=false", "model.gamma=0", "model.mask_text=mlm", "data.distort=false")),
    Row(
        "soft_mask",
        "ALBEF + soft mask",
        ("model.soft_mask=true", "model.gamma=0", "model.mask_text=mlm", "data.distort=false"),
        base="albef",
    ),
    Row(
        "focal",
        "ALBEF + focal",
        ("model.soft_mask=false", "model.gamma=1", "model.mask_text=mlm", "data.distort=false"),
        base="albef",
    ),
    Row(
        "augmentation",
        "ALBEF + multi-modal augmentation",
        ("model.soft_mask=false", "model.gamma=0", "model.mask_text=all", "data.distort=true"),
        base="albef",
    ),
    Row(
        "all",
        "SoftMask++ (all)",
        ("model.soft_mask=true", "model.gamma=1", "model.mask_text=all", "data.distort=true"),
        base="albef",
    ),
)

STUDIES = (
    Study(
        method="sycoca",
        title="SyCoCa",
        note=(
            "CoCa is trained without a pooler. The paper's rows are interpreted as follows: with attentive masking on "
            "IC, the caption decoder sees the half of the patches that are most similar to the caption; TG-MIM with "
            "random masks reconstructs random patches, and the caption decoder sees the whole image. CIDEr scores "
            "captions generated from the whole image in every row, chosen by both heads as in evaluation. All rows "
            "have weight 2 of ITC, where the paper has 1, and the focal factor gamma 1. The paper's figures are "
            "zero-shot retrieval on COCO after training on CC3M."
        ),
        config=CONFIGS / "sycoca.yaml",
        rows=SYCOCA_ROWS,
        figures={
            "mR": mean_recall(UNSEEN),
            "CIDEr": section_figure(UNSEEN, "captioning", "cider"),
            "mR, trained": mean_recall(SEEN),
            "CIDEr, trained": section_figure(SEEN, "captioning", "cider"),
        },
        published=("mTR", "mIR"),
    ),
    Study(
        method="softmask_pp",
        title="SoftMask++",
        note=(
            "Each of the three middle rows adds one part to ALBEF, the last adds all three. Multi-modal augmentation "
            "means distorted images and, once the contrastive loss is not alone, masked captions for every loss. All "
            "rows, ALBEF's included, differ from the papers alike: no queue, no soft targets and no momentum, ITC at "
            "weight 2 and MLM at 0.25, the contrastive loss alone for the first steps, easy negatives, no RandAugment. "
            "No figures are published for single parts."
        ),
        config=CONFIGS / "softmask_pp.yaml",
        rows=SOFTMASK_PP_ROWS,
        figures={
            "mR": mean_recall(UNSEEN),
            "R@1, ITM": first_recall(UNSEEN, "itm"),
            "pointing game": section_figure(UNSEEN, "grounding", "pointing"),
            "mR, trained": mean_recall(SEEN),
            "R@1, ITM, trained": first_recall(SEEN, "itm"),
        },
    ),
)
