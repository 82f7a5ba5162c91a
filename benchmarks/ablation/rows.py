"""The rows of both ablations: their overrides of a study's configuration, and what is measured.

A row sets every key in which the rows of its study differ, even to its configuration's value, so that a change of
the configuration cannot make two rows equal. All other settings are those of the study's configuration.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.studies.study import Row, Study, first_recall, mean_recall, section_figure
from softmask.tasks.sycoca import RECONSTRUCTION

CONFIGS = Path(__file__).parent
UNSEEN, SEEN = "unseen", "seen"  # the artist that training never sees, and the artists of training
GALLERY = "256"  # images in the retrieval gallery
TEST_DATA = {
    UNSEEN: ("--data", "data/artists/test-*.tar", "--pairs", GALLERY),
    SEEN: ("--data", "data/artists/seen-*.tar", "--pairs", GALLERY),
}

ALONE = ("optimizer.lr=1.0e-3", "optimizer.warmup_steps=50")  # of the contrastive loss, from random weights
FROM_CONTRAST = "starts/contrast"
FROM_SYCOCA_CONTRAST = "starts/sycoca_contrast"

SYCOCA_ROWS = (
    Row(
        "itc",
        "ITC",
        ("model.weights.caption=0", "model.caption_masking=none", "model.masks=attentive", "model.reconstruct=false"),
        published=(13.5, 14.8),
        init=FROM_SYCOCA_CONTRAST,
    ),
    Row(
        "coca",
        "CoCa (ITC + IC)",
        ("model.weights.caption=2", "model.caption_masking=none", "model.masks=attentive", "model.reconstruct=false"),
        base="itc",
        published=(16.1, 16.0),
        init=FROM_SYCOCA_CONTRAST,
    ),
    Row(
        "attentive_ic",
        "CoCa + attentive masking on IC",
        ("model.weights.caption=2", "model.caption_masking=tokens", "model.masks=attentive", "model.reconstruct=false"),
        base="coca",
        published=(17.5, 18.3),
        init=FROM_SYCOCA_CONTRAST,
    ),
    Row(
        "random_tgmim",
        "CoCa + TG-MIM with random masks",
        ("model.weights.caption=2", "model.caption_masking=none", "model.masks=random", "model.reconstruct=true"),
        base="coca",
        published=(14.4, 15.2),
        init=FROM_SYCOCA_CONTRAST,
        init_heads=RECONSTRUCTION,
    ),
    Row(
        "sycoca",
        "SyCoCa",
        ("model.weights.caption=2", "model.caption_masking=tokens", "model.masks=attentive", "model.reconstruct=true"),
        base="coca",
        published=(18.3, 18.4),
        init=FROM_SYCOCA_CONTRAST,
        init_heads=RECONSTRUCTION,
    ),
)

SOFTMASK_PP_ROWS = (
    Row(
        "albef",
        "ALBEF",
        ("model.soft_mask=false", "model.gamma=0", "model.mask_text=mlm", "data.distort=false"),
        init=FROM_CONTRAST,
    ),
    Row(
        "soft_mask",
        "ALBEF + soft mask",
        ("model.soft_mask=true", "model.gamma=0", "model.mask_text=mlm", "data.distort=false"),
        base="albef",
        init=FROM_CONTRAST,
    ),
    Row(
        "focal",
        "ALBEF + focal",
        ("model.soft_mask=false", "model.gamma=1", "model.mask_text=mlm", "data.distort=false"),
        base="albef",
        init=FROM_CONTRAST,
    ),
    Row(
        "augmentation",
        "ALBEF + multi-modal augmentation",
        ("model.soft_mask=false", "model.gamma=0", "model.mask_text=all", "data.distort=true"),
        base="albef",
        init=FROM_CONTRAST,
    ),
    Row(
        "all",
        "SoftMask++ (all)",
        ("model.soft_mask=true", "model.gamma=1", "model.mask_text=all", "data.distort=true"),
        base="albef",
        init=FROM_CONTRAST,
    ),
)

STARTS = Study(
    name="starts",
    title="",
    note="",
    config=CONFIGS / "softmask_pp.yaml",
    evaluations=TEST_DATA,
    rows=(
        Row(
            "contrast",
            "SoftMask++ and ALBEF, the contrastive loss alone",
            (*SOFTMASK_PP_ROWS[0].overrides, *ALONE, "train.steps=700", "model.contrast_steps=700"),
        ),
        Row(
            "sycoca_contrast",
            "SyCoCa and CoCa, the contrastive loss alone",
            (*SYCOCA_ROWS[0].overrides, *ALONE, "train.steps=700"),
            config=CONFIGS / "sycoca.yaml",
        ),
    ),
    shown=False,
)

STUDIES = (
    STARTS,
    Study(
        name="sycoca",
        title="SyCoCa",
        note=(
            "CoCa is trained without a pooler. The paper's rows are interpreted as follows: with attentive masking on "
            "IC, the caption decoder sees the three quarters of the patches that are most similar to the caption's "
            "words, and in every second step the whole image (the paper: half, in every step); TG-MIM with random "
            "masks reconstructs random patches, and the caption decoder sees the whole image. CIDEr scores captions "
            "generated from the whole image in every row, chosen by both heads as in evaluation. All rows "
            "have weight 2 of ITC, where the paper has 1. The paper's figures are zero-shot retrieval on COCO after "
            "training on CC3M."
        ),
        evaluations=TEST_DATA,
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
        name="softmask_pp",
        title="SoftMask++",
        note=(
            "Each of the three middle rows adds one part to ALBEF, the last adds all three. Multi-modal augmentation "
            "means distorted images and, once the contrastive loss is not alone, masked captions for every loss. All "
            "rows, ALBEF's included, differ from the papers alike: no queue, no soft targets and no momentum, ITC at "
            "weight 2 and MLM at 0.25, the contrastive loss alone for the first steps, easy negatives, no RandAugment. "
            "No figures are published for single parts."
        ),
        evaluations=TEST_DATA,
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
