"""Fine-tuned retrieval: the contrastive loss, where captions of one image are positives of each other, and ITM."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from softmask.models.config import check
from softmask.models.softmask_pp.config import LossWeights, SoftMaskPPConfig
from softmask.models.sycoca.config import SyCoCaConfig, SyCoCaWeights
from softmask.tasks.base import Task
from softmask.tasks.downstream import FewerTerms, without
from softmask.tasks.sycoca import RECONSTRUCTION

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class RetrievalHead:
    """Retrieval: the `head:` section of a configuration."""

    rerank: int = 128  # candidates that ITM re-ranks in validation; ALBEF: 256 on COCO, 128 on Flickr30K

    def __post_init__(self) -> None:
        check(self, {"rerank": (self.rerank >= 1, "at least 1")})


class RetrievalTask(FewerTerms):
    """SoftMask++ and ALBEF: ITC and ITM. SyCoCa and CoCa: ITC alone."""

    Head = RetrievalHead
    models = {
        "softmask_pp": "softmask.models.softmask_pp.model:SoftMaskPP",
        "sycoca": "softmask.models.sycoca.model:SyCoCa",
    }
    section = "retrieval"
    metric = "mean recall"
    name = "retrieval"
    view = Task.view

    def __init__(self, method: Any, method_name: str, head: Any = None) -> None:
        super().__init__(method, method_name, head)
        self.matches_pairs, self.curves = method.matches_pairs, method.curves

    def check_batch(self, config: Any, batch: int) -> None:
        self.method.check_batch(config, batch)

    def step_options(self, config: Any, step: int, *, steps_per_epoch: float) -> dict[str, Any]:
        return self.method.step_options(self.terms(config), step, steps_per_epoch=steps_per_epoch)

    def initial_weights(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return without(given, RECONSTRUCTION)

    def score(self, result: dict[str, Any]) -> float:
        """The mean of R@1, R@5 and R@10 both ways, re-ranked if the model has ITM."""
        stage = result.get("itm", result["itc"])
        return fmean(share for way in ("i2t", "t2i") for share in stage[way].values())

    def terms(self, config: Any) -> Any:
        if isinstance(config, SoftMaskPPConfig):
            weights = LossWeights(itc=config.weights.itc, itm=config.weights.itm, itm_soft=0.0, mlm=0.0)
            return replace(
                config, weights=weights, share_positives=True, soft_mask=False, mask_text="mlm", contrast_steps=0
            )
        assert isinstance(config, SyCoCaConfig)
        weights_of_itc = SyCoCaWeights(itc=1.0, caption=0.0, tgmim=0.0)
        return replace(config, weights=weights_of_itc, reconstruct=False, caption_masking="none")
