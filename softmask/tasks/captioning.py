"""Fine-tuned captioning of SyCoCa and CoCa: the caption loss alone, on whole images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from softmask.models.config import check
from softmask.models.sycoca.config import SyCoCaWeights
from softmask.tasks.base import Curve
from softmask.tasks.downstream import DownstreamTask, without
from softmask.tasks.sycoca import MOMENTUM, RECONSTRUCTION

if TYPE_CHECKING:
    from torch import Tensor, nn

    from softmask.models.config import SpecialIds


@dataclass
class CaptioningHead:
    """Captioning: the `head:` section of a configuration."""

    beams: int = 1  # of validation's search; 1: greedy

    def __post_init__(self) -> None:
        check(self, {"beams": (self.beams >= 1, "at least 1")})


class CaptioningTask(DownstreamTask):
    Head = CaptioningHead
    models = {"sycoca": "softmask.models.sycoca.model:SyCoCa"}
    section = "captioning"
    metric = "cider"
    name = "captioning"
    curves = {"caption": Curve("IC: the next word", "nats")}

    def build(self, config: Any, special_ids: SpecialIds) -> nn.Module:
        return self.method.build(_terms(config), special_ids)

    def weight_origins(self, model: Any) -> dict[str, str]:
        return self.method.weight_origins(model)

    def title(self, config: Any) -> str:
        return super().title(_terms(config))

    def facts(self, config: Any) -> list[tuple[str, str]]:
        return super().facts(_terms(config))

    def step_options(self, config: Any, step: int, *, steps_per_epoch: float) -> dict[str, Any]:
        return {"whole": True}

    def initial_weights(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return without(given, RECONSTRUCTION + MOMENTUM)


def _terms(config: Any) -> Any:
    """The `model:` section with the caption loss alone."""
    weights = SyCoCaWeights(itc=0.0, caption=1.0, tgmim=0.0)
    return replace(config, weights=weights, reconstruct=False, caption_masking="none", queue_size=0)
