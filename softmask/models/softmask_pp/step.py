"""What the loss terms of one SoftMask++ step share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from softmask.batch import Batch
from softmask.models.layers.packing import HostInts, Packing
from softmask.models.softmask_pp.backbone import Encoded
from softmask.models.softmask_pp.masking import Draws


@dataclass
class Step:
    """`captions` packs the B captions that all terms read and, with `mask_text: mlm`, the B masked captions after them.
    The tokens of `text` and `text_teacher` follow this packing.
    """

    batch: Batch
    draws: Draws
    labels: Tensor  # [B, T] of the tokens that MLM predicts, else IGNORE
    chosen: HostInts  # the number of these tokens, and the largest number in one caption
    input_ids: Tensor  # [B, T], as every term but MLM reads them
    captions: Packing
    tokens: int  # in the B captions
    alpha: float
    logit_scale: Tensor
    image: Encoded
    text: Encoded
    image_teacher: Encoded
    text_teacher: Encoded
