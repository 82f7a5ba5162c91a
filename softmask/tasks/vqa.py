"""VQA: the answer to a question about a picture, chosen from a list or generated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from softmask.models.config import VqaHead
from softmask.tasks.base import Curve, Split, Task
from softmask.tasks.downstream import DistilledTask, finished, paths_of, pretrained_encoders, require_targets

if TYPE_CHECKING:
    from torch import Tensor

    from softmask.batch import Batch
    from softmask.data import CaptionTokenizer, DataConfig, Record, Source

VISUAL_GENOME_WEIGHT = 0.5
"""Of Visual Genome's single answers. Those of VQA weigh their share of a question's ten."""

AT_ONCE = 4096  # texts that are counted at a time

DECODER = {
    "backbone.text.embeddings.": "backbone.decoder.embeddings.",
    "backbone.fusion.": "backbone.decoder.fusion.",
    "backbone.mlm_head.": "backbone.decoder.head.",
    "caption_decoder.": "backbone.caption_decoder.",
    "caption_head.": "backbone.caption_head.",
}
"""Parts of a pre-trained model, SoftMask++ or SyCoCa, that the decoder starts from."""


class VqaTask(DistilledTask):
    Head = VqaHead
    models = {"softmask_pp": "softmask.models.softmask_pp.vqa:Vqa", "sycoca": "softmask.models.sycoca.vqa:Vqa"}
    section = "softmask.evaluation.tasks.vqa:Vqa"
    metric = "accuracy"
    name = "VQA"
    view = "softmask.report.tasks.vqa:VqaView"
    new_parts = ("backbone.decoder",)
    curves = {"tokens": Curve("Accuracy of the answers' next tokens on training batches")}

    def __init__(self, method: Task, method_name: str, head: Any = None) -> None:
        super().__init__(method, method_name, head)
        if method_name == "sycoca":  # its decoder reads question and answer as one text
            self.tokens_behind = self.head.answer_length - 2

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

    def text_facts(self, source: Any, tokenizer: CaptionTokenizer) -> list[str]:
        answers = {text: None for index in range(len(source)) for text in source.example(index).target["answers"]}
        cut = list(texts_over(answers, tokenizer, length=self.head.answer_length))
        such = f", such as {cut[0]!r:.60}" if cut else ""
        length = self.head.answer_length
        return [f"answers {length} tokens at most, which cuts {len(cut):,} of {len(answers):,} different ones{such}"]

    def initial_weights(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        decoder = {
            name.replace(start, own, 1): tensor
            for start, own in DECODER.items()
            for name, tensor in given.items()
            if name.startswith(start)
        }
        return pretrained_encoders(given, distilled=self.head.alpha > 0, more=decoder)


def texts_over(texts: Iterable[str], tokenizer: CaptionTokenizer, *, length: int) -> Iterator[str]:
    """Those texts that have more than `length` tokens, [CLS] and [SEP] included."""
    rest = iter(texts)
    while some := list(islice(rest, AT_ONCE)):
        cut = tokenizer(some, max_length=length).cut.tolist()
        yield from (text for text, is_cut in zip(some, cut, strict=True) if is_cut)


def weighted_answers(target: dict[str, Any]) -> dict[str, float]:
    """Different answers of a question -> their weights in the loss."""
    answers = target["answers"]
    if target.get("dataset") == "vg":
        return dict.fromkeys(answers, VISUAL_GENOME_WEIGHT)
    return {text: count / len(answers) for text, count in Counter(answers).items()}
