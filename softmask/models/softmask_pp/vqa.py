"""VQA on ALBEF's encoders: a decoder reads the question's fused states and writes the answer or ranks a list of them.

A question's keys and values are projected once for all its answers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from softmask.models.answers import AnswerModel, AnswerNetwork, Places
from softmask.models.config import SpecialIds, TextConfig, VqaHead
from softmask.models.layers.bert import Embeddings, MLMHead
from softmask.models.layers.numerics import initialize
from softmask.models.layers.packing import Packing
from softmask.models.softmask_pp.backbone import FusedEncoder
from softmask.models.softmask_pp.config import SoftMaskPPConfig
from softmask.models.softmask_pp.fusion import FusionEncoder, FusionStart, ImageKeys, PairIndex


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

    def __len__(self) -> int:
        return len(self.padding)

    def pairs(self, question: Tensor) -> PairIndex:
        """Answers to the questions at question [A]."""
        return PairIndex(kv_index=question, key_padding_mask=self.padding)


class VqaNetwork(FusedEncoder, AnswerNetwork):
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
        packing = Packing.of(attention_mask)
        start = self.fusion.start(self.text(input_ids, packing), packing)
        states, _ = self.fusion(start, self.fusion.project(self.vision(images)))
        return Questions(self.decoder.fusion.project(packing.pad(states)), ~attention_mask)

    def start(self, answer_ids: Tensor, packing: Packing) -> FusionStart:
        return self.decoder.start(answer_ids, packing)

    def decode(self, questions: Questions, answers: FusionStart, question: Tensor, places: Places) -> Tensor:
        packing = answers.packing
        read = packing.token_index.view(packing.mask.shape)[places.answer, places.column]
        return self.decoder(answers, questions.keys, questions.pairs(question), read)


class Vqa(AnswerModel[VqaNetwork]):
    def __init__(self, config: SoftMaskPPConfig, head: VqaHead, *, special_ids: SpecialIds) -> None:
        super().__init__(config, VqaNetwork(config), head, special_ids=special_ids)
