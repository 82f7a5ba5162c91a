"""VQA of both methods: the loss of answers, their ranking and their generation. The methods' networks differ in what
reads the question and writes the answer.

All answers to a question share what is computed of it and of its image, and answers carry no padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from softmask.batch import AnswerBatch
from softmask.models.config import SpecialIds, VqaHead
from softmask.models.distilled import Distilled, Loss, Network, accuracy
from softmask.models.layers.numerics import at_least_fp32
from softmask.models.layers.packing import Packing
from softmask.models.layers.token_loss import masked_token_loss


class Started(Protocol):
    """Answers before they read a question."""

    packing: Packing

    def take(self, rows: Tensor, size: int) -> Any:
        """The answers rows [M], with `size` tokens in all; rows may repeat."""


@dataclass(frozen=True)
class Places:
    """Tokens of answers [A, T] that predict the next one: their answers [M] and columns [M]."""

    answer: Tensor
    column: Tensor

    @staticmethod
    def of(packing: Packing, *, skip: int = 0) -> Places:
        """All tokens but an answer's first `skip` and its last."""
        follows = packing.mask[:, 1:].clone()
        follows[:, :skip] = False
        return Places(*follows.nonzero(as_tuple=True))

    def next(self, answers: Tensor) -> Tensor:
        """The tokens [M] that they predict."""
        return answers[self.answer, self.column + 1]


class AnswerNetwork(Network):
    """Reads questions about images, and predicts their answers' tokens."""

    def read(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, *, picture: Tensor | None = None) -> Any:
        """B questions [B, T] with the images that picture [B] names (None: one each), and their number as `len`."""
        raise NotImplementedError

    def start(self, answer_ids: Tensor, packing: Packing) -> Started:
        """Answers [A, T], from [CLS] on, as far as all questions share them."""
        raise NotImplementedError

    def decode(self, questions: Any, answers: Any, question: Tensor, places: Places) -> Tensor:
        """Logits [M, vocabulary] of the tokens after `places` of answers, to the questions of numbers question [A]."""
        raise NotImplementedError

    def forward(self, batch: AnswerBatch, packing: Packing, places: Places) -> Tensor:
        """Logits [M, vocabulary] of the tokens after `places` of the batch's answers."""
        questions = self.read(batch.images, batch.input_ids, batch.attention_mask)
        assert batch.answer_ids is not None and batch.question is not None
        return self.decode(questions, self.start(batch.answer_ids, packing), batch.question, places)


A = TypeVar("A", bound=AnswerNetwork)


@dataclass
class AnswerList:
    """Answers [M, T] to choose from, with their mask, and what all questions share of them."""

    input_ids: Tensor
    mask: Tensor
    start: Started


class AnswerModel(Distilled[A]):
    """The loss sums, over all answers of a batch, the weight of the answer times the cross-entropy of its tokens, each
    distilled as ``(1 - alpha) CE(label) + alpha CE(momentum copy)``, and divides by the number of questions."""

    def __init__(self, config: Any, network: A, head: VqaHead, *, special_ids: SpecialIds) -> None:
        super().__init__(config, network, head)
        self.special_ids = special_ids

    def forward(self, batch: AnswerBatch, *, alpha: float) -> Loss:
        assert batch.answer_ids is not None and batch.answer_mask is not None and batch.answer_weight is not None
        packing = Packing.of(batch.answer_mask, batch.num_answer_tokens)
        places = Places.of(packing)
        label = places.next(batch.answer_ids)
        logits, teacher = self.backbone(batch, packing, places), None
        if alpha > 0 and self.momentum_encoder is not None:
            with torch.no_grad():
                teacher = self.momentum_encoder(batch, packing, places)
        weight = batch.answer_weight[places.answer]
        loss = masked_token_loss(at_least_fp32(logits), label, teacher=teacher, alpha=alpha, weight=weight)
        return Loss(loss / len(batch.images), {"tokens": accuracy(logits, label)})

    # -- evaluation -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def list_answers(self, input_ids: Tensor, mask: Tensor) -> AnswerList:
        """Answers [M, T] of token ids from [CLS] to [SEP], and what all questions share of them."""
        return AnswerList(input_ids, mask, self.backbone.start(input_ids, Packing.of(mask)))

    @torch.no_grad()
    def read_questions(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, *, picture: Tensor | None = None
    ) -> Any:
        """B questions with the images that picture [B] names; None: one each."""
        return self.backbone.read(images, input_ids, attention_mask, picture=picture)

    @torch.no_grad()
    def rank(self, questions: Any, answers: AnswerList, *, k: int) -> tuple[Tensor, Tensor]:
        """The k answers whose first token is the most probable after each of B questions: their numbers [B, k] and
        log-probabilities [B, k], best first.

        A log-probability is the sum over all tokens of the answer, [SEP] included, each counted once.
        """
        count, device = len(questions), answers.input_ids.device
        k = min(k, len(answers.input_ids))
        first = self.first_token(questions)[:, answers.input_ids[:, 1]]  # [B, M]
        chosen = first.topk(k, dim=1).indices  # [B, k]
        question = torch.arange(count, device=device).repeat_interleave(k)
        rows, score = chosen.flatten(), first.gather(1, chosen).flatten()
        start = answers.start.take(rows, int(answers.mask.sum(1)[rows].sum()))
        places = Places.of(start.packing, skip=1)  # the first token's score is known
        logits = self.backbone.decode(questions, start, question, places)
        known = _log_probability(logits, places.next(answers.input_ids[rows]))
        score = score.index_add(0, places.answer, known).view_as(chosen)
        score, order = score.sort(dim=1, descending=True, stable=True)
        return chosen.gather(1, order), score

    def first_token(self, questions: Any) -> Tensor:
        """Log-probabilities [B, vocabulary] fp32 of the first token of an answer to each of B questions."""
        begun = torch.full((len(questions), 1), self.special_ids.cls, device=next(self.parameters()).device)
        return at_least_fp32(self._next(questions, begun)).log_softmax(1)

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        picture: Tensor | None = None,
        max_length: int,
    ) -> Tensor:
        """Greedy answers [B, T <= max_length] of token ids from [CLS] to [SEP], then [PAD]."""
        special, count = self.special_ids, len(input_ids)
        questions = self.backbone.read(images, input_ids, attention_mask, picture=picture)
        ids = torch.full((count, 1), special.cls, device=images.device)
        ended = torch.zeros(count, dtype=torch.bool, device=images.device)
        while ids.shape[1] < max_length and not ended.all():
            token = self._next(questions, ids).argmax(1)
            ids = torch.cat([ids, token.masked_fill(ended, special.pad)[:, None]], dim=1)
            ended |= token == special.sep
        return ids

    def _next(self, questions: Any, ids: Tensor) -> Tensor:
        """Logits [B, vocabulary] of the token after the answers' first ones, ids [B, T], to B questions."""
        own = torch.arange(len(ids), device=ids.device)
        start = self.backbone.start(ids, Packing.full(len(ids), ids.shape[1], ids.device))
        return self.backbone.decode(questions, start, own, Places(own, torch.full_like(own, ids.shape[1] - 1)))


def _log_probability(logits: Tensor, label: Tensor) -> Tensor:
    """log softmax(logits [M, V]) at label [M]: [M] fp32."""
    logits = at_least_fp32(logits)
    return logits.gather(1, label[:, None])[:, 0] - logits.logsumexp(1)
