"""VQA on SyCoCa: the caption decoder sees the image, reads the question as the start of a text, and writes the answer
behind it or ranks a list of answers.

The text is [CLS] question [SEP] answer [SEP]. Tokens see earlier ones alone, so what is computed of a question does not
depend on its answer: all answers to a question stand behind it in one sequence, each at the positions of the question's
next tokens, and do not see each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from softmask.models.answers import AnswerModel, AnswerNetwork, Places
from softmask.models.config import SpecialIds, VqaHead
from softmask.models.layers.numerics import initialize
from softmask.models.layers.packing import Packed, Packing
from softmask.models.sycoca.backbone import Encoders
from softmask.models.sycoca.caption_head import caption_parts
from softmask.models.sycoca.config import SyCoCaConfig

QUESTION = -1  # the branch of a question's tokens


@dataclass
class Questions:
    """B questions [B, T], and what the caption decoder reads of their images, [B, P, D]."""

    context: Tensor
    input_ids: Tensor
    packing: Packing

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class Answers:
    """Answers [A, T] from [CLS] on."""

    input_ids: Tensor
    packing: Packing

    def take(self, rows: Tensor, size: int) -> Answers:
        return Answers(self.input_ids[rows], Packing(self.packing.mask[rows], size))


@dataclass
class Branches:
    """Questions, each with all its answers behind it: B sequences of L tokens."""

    input_ids: Tensor  # [B, L]
    packing: Packing
    position: Tensor  # [B, L]
    visible: Tensor  # [B, L, L] bool: the tokens that each one sees
    read: Tensor  # [M] numbers of the packed tokens at `places`

    @staticmethod
    def of(questions: Questions, answers: Answers, question: Tensor, places: Places) -> Branches:
        """An answer's [CLS] is the question's last token; tokens that no place needs are left out."""
        count, width = questions.input_ids.shape
        column = torch.arange(answers.input_ids.shape[1], device=question.device)
        last = torch.zeros_like(question).scatter_reduce(0, places.answer, places.column, "amax")
        rows, columns = ((column > 0) & (column <= last[:, None])).nonzero(as_tuple=True)
        owner, order = question[rows].sort(stable=True)
        rows, columns = rows[order], columns[order]
        own = torch.bincount(owner, minlength=count)
        place = width + torch.arange(len(rows), device=owner.device) - (own.cumsum(0) - own)[owner]
        longer = (0, int(own.max()))
        lengths = questions.packing.mask.sum(1)

        def joined(of_questions: Tensor, of_answers: Tensor, *, empty: int = 0) -> Tensor:
            return F.pad(of_questions, longer, value=empty).index_put((owner, place), of_answers)

        ids = joined(questions.input_ids, answers.input_ids[rows, columns])
        mask = joined(questions.packing.mask, torch.ones_like(rows, dtype=torch.bool))
        first = torch.arange(width, device=owner.device).expand(count, -1)
        position = joined(first, lengths[owner] + columns - 1)
        branch = joined(torch.full_like(first, QUESTION), rows, empty=QUESTION)
        packing = Packing(mask, questions.packing.size + len(rows))
        where = torch.zeros_like(answers.input_ids).index_put((rows, columns), place)
        where[:, 0] = lengths[question] - 1
        read = packing.token_index.view(mask.shape)[question[places.answer], where[places.answer, places.column]]
        return Branches(ids, packing, position, _visible(branch, mask), read)


def _visible(branch: Tensor, mask: Tensor) -> Tensor:
    """[B, L, L] bool: real tokens of the question and of a token's own answer, up to itself."""
    past = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device).tril()
    same = (branch[:, None] == QUESTION) | (branch[:, None] == branch[:, :, None])
    return same & past & mask[:, None]


class VqaNetwork(Encoders, AnswerNetwork):
    """The encoders, the caption decoder and its head."""

    def __init__(self, config: SyCoCaConfig) -> None:
        super().__init__(config)
        text = config.text
        initialize(self.text, std=text.initializer_range)
        if text.style == "open_clip":
            self.initialize_text_as_open_clip()
            self.text.norm.requires_grad_(False)  # it is CLS's alone
        self.text.cls.requires_grad_(False)  # of the contrastive loss
        self.caption_decoder, self.caption_head = caption_parts(text, image_width=self.vision.width)

    def set_activation_checkpointing(self, enable: bool) -> None:
        super().set_activation_checkpointing(enable)
        self.caption_decoder.activation_checkpointing = enable

    def read(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, *, picture: Tensor | None = None
    ) -> Questions:
        context = self.pool(self.vision(images))[1]
        shown = context if picture is None else context[picture]
        return Questions(shown, input_ids, Packing.of(attention_mask))

    def start(self, answer_ids: Tensor, packing: Packing) -> Answers:
        return Answers(answer_ids, packing)

    def decode(self, questions: Questions, answers: Answers, question: Tensor, places: Places) -> Tensor:
        joined = Branches.of(questions, answers, question, places)
        given = {"position": joined.position, "visible": joined.visible}
        tokens = Packed(self.text.tokens(joined.input_ids, joined.packing, **given), joined.packing)
        states = self.caption_decoder(tokens, Packed.full(questions.context), visible=joined.visible)
        return self.caption_head(states.index_select(0, joined.read))


class Vqa(AnswerModel[VqaNetwork]):
    def __init__(self, config: SyCoCaConfig, head: VqaHead, *, special_ids: SpecialIds) -> None:
        super().__init__(config, VqaNetwork(config), head, special_ids=special_ids)
