"""NLVR2: whether a sentence is true of a left and a right picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softmask.tasks.downstream import FusedClassification, doubled_layers

if TYPE_CHECKING:
    from torch import Tensor


class Nlvr2Task(FusedClassification):
    models = {"softmask_pp": "softmask.models.softmask_pp.classifier:Nlvr2"}
    reader = "softmask.data.formats.nlvr2:open_nlvr2"
    section = "softmask.evaluation.tasks.nlvr2:Nlvr2"
    name = "NLVR2"

    def initial_weights(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return super().initial_weights(doubled_layers(given) if "itm_head.weight" in given else given)
