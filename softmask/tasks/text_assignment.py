"""Text assignment on captioned pictures, before NLVR2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softmask.tasks.base import Curve
from softmask.tasks.downstream import ENCODERS, DownstreamTask
from softmask.tasks.nlvr2 import doubled_layers

if TYPE_CHECKING:
    from torch import Tensor

PROJECTIONS = ("backbone.image_projection.", "backbone.text_projection.")


class TextAssignmentTask(DownstreamTask):
    models = {"softmask_pp": "softmask.models.softmask_pp.text_assignment:TextAssignment"}
    section = "softmask.evaluation.tasks.text_assignment:TextAssignment"
    metric = "accuracy"
    name = "text assignment"
    new_parts = ("backbone.assignment",)
    curves = {"accuracy": Curve("Accuracy on training batches")}

    def initial_weights(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        if "itm_head.weight" not in given:
            return given
        kept = {name: tensor for name, tensor in given.items() if name.startswith((*ENCODERS, *PROJECTIONS))}
        return doubled_layers(kept)
