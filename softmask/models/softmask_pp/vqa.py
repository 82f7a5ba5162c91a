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

    def read(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, *, picture: Tensor | None = None
    ) -> Questions:
        return self.read_recorded(images, input_ids, attention_mask, picture=picture)[0]

    def read_recorded(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        picture: Tensor | None = None,
        record_layer: int | None = None,
    ) -> tuple[Questions, Fused]:
        """Questions with their images, and what maps of their words need."""
        packing = Packing.of(attention_mask)
        with without_graph(record_layer is not None):
            start = self.fusion.start(self.text(input_ids, packing), packing)
            keys = self.fusion.project(self.vision(images))
        pairs = PairIndex(kv_index=picture)
        states, record = self.fusion(start, keys, pairs, record_layer=record_layer, grad_from=record_layer or 0)
        questions = Questions(self.decoder.fusion.project(packing.pad(states)), ~attention_mask)
        return questions, Fused(states, record, keys)

    def start(self, answer_ids: Tensor, packing: Packing) -> FusionStart:
        return self.decoder.start(answer_ids, packing)

    def decode(self, questions: Questions, answers: FusionStart, question: Tensor, places: Places) -> Tensor:
        packing = answers.packing
        read = packing.token_index.view(packing.mask.shape)[places.answer, places.column]
        return self.decoder(answers, questions.keys, questions.pairs(question), read)


class Vqa(AnswerModel[VqaNetwork]):
    def __init__(self, config: SoftMaskPPConfig, head: VqaHead, *, special_ids: SpecialIds) -> None:
        super().__init__(config, VqaNetwork(config), head, special_ids=special_ids)

    def word_maps_by_picture(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, word_index: Tensor, *, normalize: str | None
    ) -> Tensor:
        """Maps [B, 1, W, patches] of the question's words at word_index [B, W, S] (token positions, -1 pads): Grad-CAM
        of the log-probability of the most probable first token of an answer. Works under no_grad and leaves every
        `.grad` untouched."""

        def fused(layer: int) -> tuple[Tensor, Fused]:
            questions, found = self.backbone.read_recorded(images, input_ids, attention_mask, record_layer=layer)
            return self.first_token(questions).amax(1), found

        options = MapOptions(self.config.cam_layer, self.num_prefix_tokens, normalize)
        return maps_by_picture(fused, word_index, options)
