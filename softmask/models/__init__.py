"""The published systems, built from `softmask.ops`."""

from .config import ConvViTConfig, LossWeights, SoftMaskPPConfig, SpecialIds, TextConfig, VisionConfig
from .softmask_pp import SoftMaskPP, SoftMaskPPOutput
from .sycoca import SyCoCa, SyCoCaOutput
from .sycoca_config import CausalTextConfig, SyCoCaConfig, SyCoCaWeights

__all__ = [
    "CausalTextConfig",
    "ConvViTConfig",
    "LossWeights",
    "SoftMaskPP",
    "SoftMaskPPConfig",
    "SoftMaskPPOutput",
    "SpecialIds",
    "SyCoCa",
    "SyCoCaConfig",
    "SyCoCaOutput",
    "SyCoCaWeights",
    "TextConfig",
    "VisionConfig",
]
