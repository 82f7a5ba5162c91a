"""The published systems, built from `softmask.ops`. Names are imported when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softmask.models.config import ConvViTConfig, SpecialIds, TextConfig, VisionConfig
    from softmask.models.softmask_pp.config import LossWeights, SoftMaskPPConfig
    from softmask.models.softmask_pp.model import SoftMaskPP, SoftMaskPPOutput
    from softmask.models.sycoca.config import CausalTextConfig, SyCoCaConfig, SyCoCaWeights
    from softmask.models.sycoca.model import SyCoCa, SyCoCaOutput

_MODULES = {
    "config": ["ConvViTConfig", "SpecialIds", "TextConfig", "VisionConfig"],
    "softmask_pp.config": ["LossWeights", "SoftMaskPPConfig"],
    "softmask_pp.model": ["SoftMaskPP", "SoftMaskPPOutput"],
    "sycoca.config": ["CausalTextConfig", "SyCoCaConfig", "SyCoCaWeights"],
    "sycoca.model": ["SyCoCa", "SyCoCaOutput"],
}

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


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"softmask.models.{module}"), name)
    raise AttributeError(f"module 'softmask.models' has no attribute {name!r}")
