"""VQA: the answer to a question about a picture, chosen from a list or generated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from softmask.models.softmask_pp.config import VqaHead
from softmask.tasks.base import Curve, Split
from softmask.tasks.downstream import DistilledTask, finished, paths_of, pretrained_encoders, require_targets

if TYPE_CHECKING:
    from torch import Tensor

    from softmask.batch import Batch
    from softmask.data import CaptionTokenizer, DataConfig, Record, Source

VISUAL_GENOME_WEIGHT = 0.5
"""Of Visual Genome's single answers. Those of VQA weigh their share of a question's ten."""

DECODER = {
    "backbone.text.embeddings.": "backbone.decoder.embeddings.",
    "backbone.fusion.": "backbone.decoder.fusion.",
    "backbone.mlm_head.": "backbone.decoder.head.",
}
"""Parts of a pre-trained model that the decoder starts from."""


class VqaTask(DistilledTask):
    Head = VqaHead
    models = {"softmask_pp": "softmask.models.softmask_pp.vqa:Vqa"}
    section = "softmask.evaluation.tasks.vqa:Vqa"
    metric = "accuracy"
    name = "VQA"
    view = "softmask.report.tasks.vqa:VqaView"
    new_parts = ("backbone.decoder",)
    curves = {"tokens": Curve("Accuracy of the answers' next tokens on training batches")}

    def open(self, paths: str | Sequence[str], data: DataConfig, *, split: Split) -> Source:
        from softmask.data.formats.vqa import open_vqa, read_answer_list

        if self.head.answer_list:
            read_answer_list(self.head.answer_list)  # what is wrong with it is said at the start
        return require_targets(open_vqa(paths_of(paths), image_root=data.image_root), split=split)

    def finish_batch(self, batch: Batch, records: Sequence[Record], tokenizer: CaptionTokenizer) -> Batch:
        import torch

        from softmask.batch import AnswerBatch

        rows = [
            (number, text, weight)
            for number, record in enumerate(records)
            for text, weight in weighted_answers(record.target).items()
        ]
        tokens = tokenizer([text for _, text, _ in rows], max_length=self.head.answer_length)
        return finished(
            AnswerBatch,
            batch,
            answer_ids=tokens.input_ids,
            answer_mask=tokens.attention_mask,
            answer_weight=torch.tensor([weight for *_, weight in rows], dtype=torch.float32),
            question=torch.tensor([number for number, *_ in rows], dtype=torch.int64),
            num_answer_tokens=int(tokens.attention_mask.sum()),
        )

    def initial_weights(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        decoder = {
            name.replace(start, own, 1): tensor
            for start, own in DECODER.items()
            for name, tensor in given.items()
            if name.startswith(start)
        }
        return pretrained_encoders(given, distilled=self.head.alpha > 0, more=decoder)


def weighted_answers(target: dict[str, Any]) -> dict[str, float]:
    """Different answers of a question -> their weights in the loss."""
    answers = target["answers"]
    if target.get("dataset") == "vg":
        return dict.fromkeys(answers, VISUAL_GENOME_WEIGHT)
    return {text: count / len(answers) for text, count in Counter(answers).items()}
