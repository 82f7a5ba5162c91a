"""Fine-tuned image classification, on the image encoder of either method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from softmask.models.config import ClassificationHead
from softmask.tasks.base import Curve, Split
from softmask.tasks.downstream import DownstreamTask, labeled, paths_of

if TYPE_CHECKING:
    from torch import Tensor

    from softmask.batch import Batch
    from softmask.data import CaptionTokenizer, DataConfig, Record, Source

NETWORK = ("backbone.vision.", "backbone.pooler.", "backbone.head.")


class ClassificationTask(DownstreamTask):
    """The names of the classes are those of the training data; other data may have some of them in another order."""

    Head = ClassificationHead
    models = {
        "softmask_pp": "softmask.models.classification:ImageClassifier",
        "sycoca": "softmask.models.classification:ImageClassifier",
    }
    section = "softmask.evaluation.tasks.classification:Classification"
    frozen_section = "softmask.evaluation.tasks.frozen_classification:FrozenClassification"
    metric = "top1"
    name = "classification"
    view = "softmask.report.tasks.classification:ClassificationView"
    new_parts = ("backbone.head",)
    curves = {"accuracy": Curve("Accuracy on training batches, mixed images included")}

    def facts(self, config: Any) -> list[tuple[str, str]]:
        """The number of the classes instead of their names, which may be thousands."""
        options = [(name, value) for name, value in super().facts(config) if name != "names"]
        return [*options, ("classes", f"{len(self.head.names):,}")]

    def open(self, paths: str | Sequence[str], data: DataConfig, *, split: Split) -> Source:
        from softmask.data.formats.classification import open_classification

        found = paths_of(paths, folders=True)
        source = open_classification(found, image_root=data.image_root, names=self.head.names or None)
        if split == "train" and not self.head.names:
            self.head.names = source.classes
        return source

    def finish_batch(self, batch: Batch, records: Sequence[Record], tokenizer: CaptionTokenizer) -> Batch:
        return labeled(batch, records)

    def initial_weights(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in given.items() if name.startswith(NETWORK)}
