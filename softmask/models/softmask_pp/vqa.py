"""VQA on ALBEF's encoders: a decoder reads the question's fused states and writes the answer or ranks a list of them.

All answers to a question share its keys and values, which are projected once, and answers carry no padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softmask.batch import AnswerBatch
from softmask.models.config import SpecialIds, TextConfig
from softmask.models.distilled import Distilled, Loss, accuracy
from softmask.models.layers.bert import Embeddings, MLMHead
from softmask.models.layers.numerics import at_least_fp32, initialize
from softmask.models.layers.packing import Packing
from softmask.models.layers.token_loss import masked_token_loss
from softmask.models.softmask_pp.backbone import FusedEncoder
from softmask.models.softmask_pp.config import SoftMaskPPConfig, VqaHead
from softmask.models.softmask_pp.fusion import FusionEncoder, FusionStart, ImageKeys, PairIndex
from softmask.models.softmask_pp.maps import Fused, MapOptions, maps_by_picture, without_graph


class AnswerDecoder(nn.Module):
    """The next token of answers that begin with [CLS], from the tokens before it and the question's fused states."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.fusion = FusionEncoder(config, image_width=config.width, causal=True)
        self.head = MLMHead(config)
        initialize(self, std=config.initializer_range)

    def start(self, input_ids: Tensor, packing: Packing) -> FusionStart:
        """Answers [A, T] before they read a question."""
        return self.fusion.start(self.embeddings(input_ids, packing), packing)

    def forward(self, start: FusionStart, keys: list[ImageKeys], pairs: PairIndex, read: Tensor) -> Tensor:
        """Logits [M, vocabulary] of the tokens after those at read [M], numbers of packed tokens."""
        states, _ = self.fusion(start, keys, pairs)
        return self.head(states.index_select(0, read), self.embeddings.word)


@dataclass
class Questions:
    """Questions as the decoder reads them: keys and values [B, H, T, E] of every layer, and which keys are padding."""

    keys: list[ImageKeys]
    padding: Tensor  # [B, T] bool

    def pairs(self, question: Tensor) -> PairIndex:
        """Answers to the questions at question [A]."""
        return PairIndex(kv_index=question, key_padding_mask=self.padding)


@dataclass
class AnswerList:
    """Answers [M, T] to choose from, with their mask, and their states before they read a question."""

    input_ids: Tensor
    mask: Tensor
    start: FusionStart


class VqaNetwork(FusedEncoder):
    """The encoders, the fusion layers, and the answers' decoder."""

    def __init__(self, config: SoftMaskPPConfig) -> None:
        super().__init__(config)
        for part in (self.text, self.fusion):
            initialize(part, std=config.text.initializer_range)
        self.decoder = AnswerDecoder(config.text)

    def set_activation_checkpointing(self, enable: bool) -> None:
        super().set_activation_checkpointing(enable)
        self.decoder.fusion.activation_checkpointing = enable

    def read(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Questions:
        """B questions with their images."""
        return self.read_recorded(images, input_ids, attention_mask)[0]

    def read_recorded(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, *, record_layer: int | None = None
    ) -> tuple[Questions, Fused]:
        """B questions with their images, and what maps of their words need."""
        packing = Packing.of(attention_mask)
        with without_graph(record_layer is not None):
            start = self.fusion.start(self.text(input_ids, packing), packing)
            keys = self.fusion.project(self.vision(images))
        states, record = self.fusion(start, keys, record_layer=record_layer, grad_from=record_layer or 0)
        questions = Questions(self.decoder.fusion.project(packing.pad(states)), ~attention_mask)
        return questions, Fused(states, record, keys)

    def forward(self, batch: AnswerBatch, packing: Packing, read: Tensor) -> Tensor:
        """Logits [M, vocabulary] after the answers' tokens at read [M], numbers of packed tokens."""
        questions = self.read(batch.images, batch.input_ids, batch.attention_mask)
        assert batch.answer_ids is not None and batch.question is not None
        start = self.decoder.start(batch.answer_ids, packing)
        return self.decoder(start, questions.keys, questions.pairs(batch.question), read)


class Vqa(Distilled[VqaNetwork]):
    """The loss sums, over all answers of a batch, the weight of the answer times the cross-entropy of its tokens, each
    distilled as ``(1 - alpha) CE(label) + alpha CE(momentum copy)``, and divides by the number of questions."""

    def __init__(self, config: SoftMaskPPConfig, head: VqaHead, *, special_ids: SpecialIds) -> None:
        super().__init__(config, VqaNetwork(config), head)
        self.special_ids = special_ids

    def forward(self, batch: AnswerBatch, *, alpha: float) -> Loss:
        assert batch.answer_ids is not None and batch.answer_mask is not None and batch.answer_weight is not None
        packing = Packing.of(batch.answer_mask, batch.num_answer_tokens)
        rows, read, label = _predicted(batch.answer_ids, packing)
        logits, teacher = self.backbone(batch, packing, read), None
        if alpha > 0 and self.momentum_encoder is not None:
            with torch.no_grad():
                teacher = self.momentum_encoder(batch, packing, read)
        weight = batch.answer_weight[rows]
        loss = masked_token_loss(at_least_fp32(logits), label, teacher=teacher, alpha=alpha, weight=weight)
        return Loss(loss / len(batch.images), {"tokens": accuracy(logits, label)})

    # -- evaluation -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def list_answers(self, input_ids: Tensor, mask: Tensor) -> AnswerList:
        """Answers [M, T] of token ids from [CLS] to [SEP], and what all questions share of them."""
        return AnswerList(input_ids, mask, self.backbone.decoder.start(input_ids, Packing.of(mask)))

    @torch.no_grad()
    def read_questions(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Questions:
        """B questions with their images."""
        return self.backbone.read(images, input_ids, attention_mask)

    @torch.no_grad()
    def rank(self, questions: Questions, answers: AnswerList, *, k: int) -> tuple[Tensor, Tensor]:
        """The k answers whose first token is the most probable after each of B questions: their numbers [B, k] and
        log-probabilities [B, k], best first.

        A log-probability is the sum over all tokens of the answer, [SEP] included, each counted once.
        """
        count, device = len(questions.padding), questions.padding.device
        k = min(k, len(answers.input_ids))
        first = self._after_start(questions)[:, answers.input_ids[:, 1]]  # [B, M]
        chosen = first.topk(k, dim=1).indices  # [B, k]
        question = torch.arange(count, device=device).repeat_interleave(k)
        rows, score = chosen.flatten(), first.gather(1, chosen).flatten()
        start = answers.start.take(rows, int(answers.mask.sum(1)[rows].sum()))
        # The first token's score is known.
        owner, read, label = _predicted(answers.input_ids[rows], start.packing, skip=1)
        logits = self.backbone.decoder(start, questions.keys, questions.pairs(question), read)
        score = score.index_add(0, owner, _log_probability(logits, label)).view_as(chosen)
        score, order = score.sort(dim=1, descending=True, stable=True)
        return chosen.gather(1, order), score

    @torch.no_grad()
    def generate(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, *, max_length: int) -> Tensor:
        """Greedy answers [B, T <= max_length] of token ids from [CLS] to [SEP], then [PAD]."""
        network, special = self.backbone, self.special_ids
        questions = network.read(images, input_ids, attention_mask)
        own = torch.arange(len(images), device=images.device)
        ids = torch.full((len(images), 1), special.cls, device=images.device)
        ended = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        while ids.shape[1] < max_length and not ended.all():
            packing = Packing.full(ids.shape[0], ids.shape[1], ids.device)
            last = torch.arange(1, len(ids) + 1, device=ids.device) * ids.shape[1] - 1
            start = network.decoder.start(ids, packing)
            token = network.decoder(start, questions.keys, questions.pairs(own), last).argmax(1)
            ids = torch.cat([ids, token.masked_fill(ended, special.pad)[:, None]], dim=1)
            ended |= token == special.sep
        return ids

    def word_maps_by_picture(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, word_index: Tensor, *, normalize: str | None
    ) -> Tensor:
        """Maps [B, 1, W, patches] of the question's words at word_index [B, W, S] (token positions, -1 pads): Grad-CAM
        of the log-probability of the most probable first token of an answer. Works under no_grad and leaves every
        `.grad` untouched."""

        def fused(layer: int) -> tuple[Tensor, Fused]:
            questions, found = self.backbone.read_recorded(images, input_ids, attention_mask, record_layer=layer)
            return self._after_start(questions).amax(1), found

        options = MapOptions(self.config.cam_layer, self.num_prefix_tokens, normalize)
        return maps_by_picture(fused, word_index, options)

    def _after_start(self, questions: Questions) -> Tensor:
        """Log-probabilities [B, vocabulary] fp32 of an answer's first token."""
        decoder, device, count = self.backbone.decoder, questions.padding.device, len(questions.padding)
        ids, own = torch.full((count, 1), self.special_ids.cls, device=device), torch.arange(count, device=device)
        start = decoder.start(ids, Packing.full(count, 1, device))
        return at_least_fp32(decoder(start, questions.keys, questions.pairs(own), own)).log_softmax(1)


def _predicted(answers: Tensor, packing: Packing, *, skip: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of answers [A, T] that follow another one, without the first `skip`: their answers [M], the numbers of
    the packed tokens before them [M], and the tokens [M]."""
    follows = packing.mask[:, 1:].clone()
    follows[:, :skip] = False
    rows, column = follows.nonzero(as_tuple=True)
    return rows, packing.token_index.view(packing.mask.shape)[rows, column], answers[rows, column + 1]


def _log_probability(logits: Tensor, label: Tensor) -> Tensor:
    """log softmax(logits [M, V]) at label [M]: [M] fp32."""
    logits = at_least_fp32(logits)
    return logits.gather(1, label[:, None])[:, 0] - logits.logsumexp(1)
