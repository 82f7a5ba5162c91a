"""Fine-tuned captioning of SyCoCa and CoCa: the caption loss alone, on whole images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from softmask.models.config import check
from softmask.models.sycoca.config import SyCoCaWeights
from softmask.tasks.base import Curve
from softmask.tasks.downstream import FewerTerms, without
from softmask.tasks.sycoca import MOMENTUM, RECONSTRUCTION

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class CaptioningHead:
    """Captioning: the `head:` section of a configuration."""

    beams: int = 1  # of validation's search; 1: greedy
    min_length: int = 0  # tokens before a caption may end
    prompt: str = ""  # text that every caption starts with, and that is not scored

    def __post_init__(self) -> None:
        check(self, {"beams": (self.beams >= 1, "at least 1"), "min_length": (self.min_length >= 0, "at least 0")})


class CaptioningTask(FewerTerms):
    Head = CaptioningHead
    models = {"sycoca": "softmask.models.sycoca.model:SyCoCa"}
    section = "captioning"
    metric = "cider"
    name = "captioning"
    view = "softmask.report.tasks.captioning:CaptioningView"
    curves = {"caption": Curve("IC: the next word", "nats")}

    def step_options(self, config: Any, step: int, *, steps_per_epoch: float) -> dict[str, Any]:
        return {"whole": True}

    def initial_weights(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return without(given, RECONSTRUCTION + MOMENTUM)

    def terms(self, config: Any) -> Any:
        weights = SyCoCaWeights(itc=0.0, caption=1.0, tgmim=0.0)
        return replace(config, weights=weights, reconstruct=False, caption_masking="none", queue_size=0)
