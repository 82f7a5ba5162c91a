"""NLVR2: whether a sentence is true of a left and a right picture. ALBEF trains text assignment before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softmask.tasks.downstream import FusedClassification

if TYPE_CHECKING:
    from torch import Tensor


class Nlvr2Task(FusedClassification):
    models = {"softmask_pp": "softmask.models.softmask_pp.classifier:Nlvr2"}
    reader = "softmask.data.formats.nlvr2:open_nlvr2"
    section = "softmask.evaluation.tasks.nlvr2:Nlvr2"
    name = "NLVR2"
    view = "softmask.report.tasks.labels:PairView"

    def initial_weights(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return super().initial_weights(doubled_layers(given) if "itm_head.weight" in given else given)


def doubled_layers(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """A pre-trained model's tensors with two copies of every fusion layer, 2 i and 2 i + 1, where the second has no
    projections of keys and values."""
    found = {}
    for name, tensor in given.items():
        start, layers, rest = name.partition("fusion.layers.")
        if not layers:
            found[name] = tensor
            continue
        number, _, part = rest.partition(".")
        found[f"{start}{layers}{2 * int(number)}.{part}"] = tensor
        if not part.startswith(("cross_attention.key.", "cross_attention.value.")):
            found[f"{start}{layers}{2 * int(number) + 1}.{part}"] = tensor
    return found
