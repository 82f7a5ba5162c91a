"""The published systems, built from `softmask.ops`."""

from .config import ConvViTConfig, LossWeights, SoftMaskPPConfig, SpecialIds, TextConfig, VisionConfig
from .softmask_pp import SoftMaskPP, SoftMaskPPOutput

__all__ = [
    "ConvViTConfig",
    "LossWeights",
    "SoftMaskPP",
    "SoftMaskPPConfig",
    "SoftMaskPPOutput",
    "SpecialIds",
    "TextConfig",
    "VisionConfig",
]
