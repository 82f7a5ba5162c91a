"""SoftMask++ (Park & Han, CVPR 2023): ALBEF with text-driven soft masks, a focal contrastive loss and masked text.

One step, as `forward` reads: encode, contrast, fuse the positive pairs, look up where the image made a pair match
for one word of its caption; then, in one pass, fuse the negatives, the soft-masked pairs and the masked captions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmask import ops
from softmask.batch import Batch
from softmask.models.config import MAX_TEMPERATURE, MIN_TEMPERATURE, SpecialIds
from softmask.models.layers.momentum import momentum_encoder_of, update_momentum_encoder
from softmask.models.layers.numerics import at_least_fp32, clamp_value, initialize
from softmask.models.layers.packing import HostInts, Packing
from softmask.models.layers.recomputation import all_ranks
from softmask.models.layers.token_loss import masked_token_loss
from softmask.models.softmask_pp.backbone import Backbone, Encoded
from softmask.models.softmask_pp.config import SoftMaskPPConfig
from softmask.models.softmask_pp.fusion import CrossRecord
from softmask.models.softmask_pp.maps import MapSource
from softmask.models.softmask_pp.masking import IGNORE, mask_tokens, pick_words, sample_negatives, word_positions
from softmask.models.softmask_pp.pairs import Pairs, Prepared, first_tokens, fuse, row_numbers, split_first

MAX_WORD_TOKENS = 8  # of a longer word, the map is the mean over its first tokens


@dataclass
class SoftMaskPPOutput:
    loss: Tensor
    terms: dict[str, Tensor]  # detached scalars
    image_teacher: Tensor  # [B, embed_dim], for the queue
    text_teacher: Tensor
    image_id: Tensor


@dataclass
class Step:
    """What the terms of one training step share.

    `captions` are the batch's B captions as every term reads them and, where `mask_text` is "mlm", the B masked ones
    behind them; the tokens of `text` and `text_teacher` are packed like that.
    """

    batch: Batch
    labels: Tensor  # [B, T] of the tokens that MLM predicts, else IGNORE
    chosen: HostInts  # how many these are, and the most of them in one caption
    input_ids: Tensor  # [B, T], as every term but MLM reads them
    captions: Packing
    tokens: int  # of the B captions
    alpha: float
    logit_scale: Tensor
    image: Encoded
    text: Encoded
    image_teacher: Encoded
    text_teacher: Encoded


class SoftMaskPP(nn.Module):
    """The model and its losses. Terms are those of the method's step 9; with `soft_mask` off, `gamma` 0 and
    `mask_text: mlm` they are ALBEF's.

    Distributed: the contrastive loss gathers features over all ranks (with gradient) and the queue holds the same
    rows everywhere; hard negatives come from the rank's own batch.
    """

    def __init__(self, config: SoftMaskPPConfig, *, special_ids: SpecialIds) -> None:
        super().__init__()
        if config.text.vocab_size <= special_ids.mask:
            raise ValueError(f"text.vocab_size: expected the tokenizer's, got {config.text.vocab_size}")
        self.config = config
        self.special_ids = special_ids
        self.backbone = Backbone(config)
        self.itm_head = nn.Linear(config.text.width, 2)
        initialize(self.itm_head, std=config.text.initializer_range)
        self.temperature = nn.Parameter(torch.tensor(config.temperature), requires_grad=config.learn_temperature)
        self.momentum_encoder = momentum_encoder_of(self.backbone)
        self.contrast = ops.MomentumContrastiveLoss(
            config.embed_dim, config.queue_size, alpha=config.alpha, gamma=config.gamma
        )

    # -- properties of the encoders ---------------------------------------------------------------------------------

    @property
    def num_prefix_tokens(self) -> int:
        return self.backbone.vision.num_prefix_tokens

    @property
    def patch_grid(self) -> tuple[int, int]:
        return self.backbone.vision.patch_grid

    def set_activation_checkpointing(self, enable: bool) -> None:
        self.backbone.set_activation_checkpointing(enable)

    # -- training -----------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, *, alpha: float | None = None, fuse: bool = True) -> SoftMaskPPOutput:
        """The loss of one batch; without `fuse` its contrastive term alone, the encoders' (see `contrast_steps`).

        Call `update_momentum` before and `enqueue` after it.
        """
        if len(batch.images) < 2:
            raise ValueError(f"batch: expected at least 2 pairs (hard negatives), got {len(batch.images)}")
        step = self._encode(batch, self.config.alpha if alpha is None else alpha, masked=fuse and self._masked_pass)
        losses = {"itc": self._contrastive(step)}
        if fuse:
            losses |= self._fused_losses(step)
        loss = sum(getattr(self.config.weights, name) * term for name, term in losses.items())
        terms = {name: term.detach() for name, term in losses.items()}
        terms["temperature"] = 1.0 / step.logit_scale.detach()
        return SoftMaskPPOutput(loss, terms, step.image_teacher.feature, step.text_teacher.feature, batch.image_id)

    def update_momentum(self) -> None:
        """EMA of the momentum encoder, once per optimizer step, before the forward pass."""
        update_momentum_encoder(self.momentum_encoder, self.backbone, self.config.momentum)

    def enqueue(self, output: SoftMaskPPOutput) -> None:
        """Put the batch's teacher features (of all ranks) into the queue, after its loss was found finite."""
        self.contrast.group = all_ranks()
        self.contrast.enqueue(output.image_teacher, output.text_teacher, ids=output.image_id)

    def statistics(self) -> list[Tensor]:
        """What a forward pass in training changes: BatchNorm's running statistics."""
        return [*self.backbone.buffers(), *self.momentum_encoder.buffers()]

    def _logit_scale(self) -> Tensor:
        """1 / temperature, within ALBEF's limits."""
        return 1.0 / clamp_value(self.temperature, least=MIN_TEMPERATURE, most=MAX_TEMPERATURE)

    # -- encoders and the contrastive term ----------------------------------------------------------------------------

    @property
    def _masked_pass(self) -> bool:
        """Whether MLM reads captions of its own."""
        return self.config.mask_text == "mlm" and self.config.weights.mlm > 0

    def _encode(self, batch: Batch, alpha: float, *, masked: bool) -> Step:
        """`masked`: encode the masked captions too."""
        options = {"vocab_size": self.config.text.vocab_size, "probability": self.config.mask_probability}
        text = mask_tokens(batch.input_ids, self.special_ids, **options)
        chosen = (text.labels != IGNORE).sum(1)
        ids = text.input_ids if self.config.mask_text == "all" else batch.input_ids
        packing = captions = Packing.of(batch.attention_mask, batch.num_tokens)
        if masked:
            ids, captions = torch.cat([ids, text.input_ids]), Packing.cat([packing, packing])
        image, student = self._encode_pairs(self.backbone, batch.images, ids, captions, packing)
        with torch.no_grad():
            image_teacher, text_teacher = self._encode_pairs(
                self.momentum_encoder, batch.images, ids, captions, packing
            )
        return Step(
            batch=batch,
            labels=text.labels,
            chosen=HostInts(chosen.sum(), chosen.max()),
            input_ids=ids[: len(batch.images)],
            captions=captions,
            tokens=packing.size,
            alpha=alpha,
            logit_scale=self._logit_scale(),
            image=image,
            text=student,
            image_teacher=image_teacher,
            text_teacher=text_teacher,
        )

    @staticmethod
    def _encode_pairs(
        backbone: Backbone, images: Tensor, ids: Tensor, captions: Packing, packing: Packing
    ) -> tuple[Encoded, Encoded]:
        """Images, and all captions at once; those of `packing`, the first of them, have a feature."""
        image, tokens = backbone.encode_image(images), backbone.text(ids, captions)
        return image, Encoded(tokens, backbone.text_feature(tokens[: packing.size], packing))

    def _contrastive(self, step: Step) -> Tensor:
        self.contrast.group = all_ranks()
        return self.contrast(
            step.image.feature,
            step.text.feature,
            step.logit_scale,
            image_teacher=step.image_teacher.feature,
            text_teacher=step.text_teacher.feature,
            alpha=step.alpha,
            ids=step.batch.image_id if self.config.share_positives else None,
        )

    @torch.no_grad()
    def _hard_negatives(self, step: Step) -> tuple[Tensor, Tensor]:
        """(a text for every image [B], an image for every text [B]), by the student against the teacher's keys."""
        temperature = self.config.negative_temperature
        ids, scale = step.batch.image_id, 1.0 / temperature if temperature else step.logit_scale
        texts = sample_negatives(scale * step.image.feature @ step.text_teacher.feature.T, ids)
        images = sample_negatives(scale * step.text.feature @ step.image_teacher.feature.T, ids)
        return texts, images

    # -- fusion -------------------------------------------------------------------------------------------------------

    def _fused_losses(self, step: Step) -> dict[str, Tensor]:
        """Every term that reads words and image together: itm, itm_soft and mlm."""
        words = self._words(step) if self.config.soft_mask else None
        hard_text, hard_image = self._hard_negatives(step)
        hard_tokens = HostInts(step.batch.attention_mask.sum(1)[hard_text].sum())
        student = self._prepare(self.backbone, step.image, step.text, step)
        teacher, with_mlm = None, self.config.weights.mlm > 0
        by_teacher = self.config.soft_mask and self.config.cam_source == "momentum"
        if by_teacher or (step.alpha > 0 and with_mlm):
            with torch.no_grad():
                teacher = self._prepare(self.momentum_encoder, step.image_teacher, step.text_teacher, step)
        positive, masked_pairs = self._positive_pairs(step), self._masked_pairs(step)
        most_masked = step.chosen.read()[1]
        read, longest = positive, 1
        if with_mlm and not self._masked_pass:  # MLM reads the positive pairs
            read, longest = positive.with_chosen(masked_pairs), 1 + most_masked
        options = {"longest": longest, "record_layer": self.config.cam_layer if self.config.soft_mask else None}
        (states,), record = fuse(self.backbone.fusion, student, [read], **options)
        cls, masked = split_first(states, read)
        match = self.itm_head(cls)
        key_weight = None
        if self.config.soft_mask:
            source = self._map_source(positive, student, teacher, self._source(match, record, student))
            key_weight = self._soft_mask(source, words)
        kinds = self._other_pairs(step, hard_text, hard_image, hard_tokens.read()[0], key_weight)
        kinds += [masked_pairs] if self._masked_pass else []
        others, _ = fuse(self.backbone.fusion, student, kinds, longest=max(most_masked, 1))
        masked = others.pop() if self._masked_pass else masked
        losses = self._matching(match, self.itm_head(torch.cat(others)).chunk(len(others)))
        return losses | ({"mlm": self._mlm(masked, masked_pairs, teacher, step)} if with_mlm else {})

    @staticmethod
    def _prepare(backbone: Backbone, image: Encoded, text: Encoded, step: Step) -> Prepared:
        return Prepared.of(backbone.fusion, image.tokens, text.tokens, step.captions)

    def _positive_pairs(self, step: Step) -> Pairs:
        own = row_numbers(step.batch.images)
        return Pairs(own, own, step.tokens, first_tokens(step.batch.attention_mask), len(own))

    def _masked_pairs(self, step: Step) -> Pairs:
        """The captions that MLM reads, with their images."""
        own = row_numbers(step.batch.images)
        texts = own + len(own) if self._masked_pass else own
        return Pairs(texts, own, step.tokens, step.labels != IGNORE, step.chosen.read()[0])

    def _other_pairs(
        self, step: Step, hard_text: Tensor, hard_image: Tensor, hard_tokens: int, key_weight: Tensor | None
    ) -> list[Pairs]:
        """(hard image, text), (image, hard text); with `key_weight`, (masked image, text), (masked image, hard text).

        The soft term's other negative, (hard image, text), is the first of them again.
        """
        own, cls = row_numbers(step.batch.images), first_tokens(step.batch.attention_mask)
        kinds = [
            Pairs(own, hard_image, step.tokens, cls, len(own)),
            Pairs(hard_text, own, hard_tokens, cls, len(own)),
        ]
        if key_weight is not None:
            kinds.append(Pairs(own, own, step.tokens, cls, len(own), key_weight))
            if self.config.soft_negatives:
                kinds.append(Pairs(hard_text, own, hard_tokens, cls, len(own), key_weight))
        return kinds

    @staticmethod
    def _matching(match: Tensor, others: Sequence[Tensor]) -> dict[str, Tensor]:
        """ITM and, where there are soft-masked pairs, ITM on them; logits [B, 2] of the pairs of `_other_pairs`."""
        losses = {"itm": _match_loss(match=[match], mismatch=[others[0], others[1]])}
        if len(others) > 2:
            mismatch = [others[0], others[3]] if len(others) > 3 else []
            losses["itm_soft"] = _match_loss(match=[others[2]], mismatch=mismatch)
        return losses

    # -- soft masks -------------------------------------------------------------------------------------------------

    def _map_source(self, positive: Pairs, student: Prepared, teacher: Prepared | None, online: MapSource) -> MapSource:
        """What the maps of the positive pairs are read from, by `cam_source`."""
        layer = self.config.cam_layer
        if self.config.cam_source == "online":
            return online
        if self.config.cam_source == "momentum":
            fusion, prepared = self.momentum_encoder.fusion, teacher
        else:
            fusion, prepared = self.backbone.fusion, student.detach()
        (cls,), record = fuse(fusion, prepared, [positive], record_layer=layer, grad_from=layer)
        return self._source(self.itm_head(cls), record, prepared)

    def _source(self, match: Tensor, record: CrossRecord, prepared: Prepared) -> MapSource:
        return MapSource(match, record, prepared.keys[self.config.cam_layer], self.num_prefix_tokens)

    def _words(self, step: Step) -> Tensor:
        """Token positions [B, S] of one random real word of each caption, -1 pads."""
        batch, input_ids = step.batch, step.input_ids
        allowed = input_ids == batch.input_ids  # a word that was masked or replaced is not in the caption read
        word = pick_words(batch.word_ids, allowed & (input_ids != self.special_ids.mask))
        return word_positions(batch.word_ids, word, max_tokens=MAX_WORD_TOKENS)

    def _soft_mask(self, source: MapSource, words: Tensor) -> Tensor:
        """Weight [B, P] of every image token for the word at words [B, S]; CLS keeps weight 1."""
        maps = source.maps(words[:, None], normalize=self.config.normalize)
        return F.pad(1.0 - self.config.strength * maps[:, 0], (self.num_prefix_tokens, 0), value=1.0)

    # -- masked language modelling --------------------------------------------------------------------------------

    def _mlm(self, states: Tensor, pairs: Pairs, teacher: Prepared | None, step: Step) -> Tensor:
        """``(1 - alpha) CE(logits, labels) + alpha CE(logits, softmax(teacher))``, mean over the masked positions."""
        logits = at_least_fp32(self.backbone.predict_tokens(states))  # [M, vocabulary]
        labels = step.labels.flatten()[pairs.chosen_places]
        targets = None
        if step.alpha > 0:
            with torch.no_grad():
                (seen,), _ = fuse(self.momentum_encoder.fusion, teacher, [pairs], longest=max(step.chosen.read()[1], 1))
                targets = self.momentum_encoder.predict_tokens(seen)
        return masked_token_loss(logits, labels, teacher=targets, alpha=step.alpha) / max(len(labels), 1)

    # -- evaluation -----------------------------------------------------------------------------------------------

    def encode_image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B, 3, S, S] -> tokens [B, P, D], normalized feature [B, embed_dim]."""
        encoded = self.backbone.encode_image(images)
        return encoded.tokens, encoded.feature

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """input_ids, attention_mask [B, T] -> tokens [B, T, D], normalized feature [B, embed_dim]."""
        packing = Packing.of(attention_mask)
        tokens = self.backbone.text(input_ids, packing)
        return packing.pad(tokens), self.backbone.text_feature(tokens, packing)

    def match(
        self, image_tokens: Tensor, text_tokens: Tensor, attention_mask: Tensor, *, kv_index: Tensor | None = None
    ) -> Tensor:
        """Matching logits [N, 2] (class 1: they match) of N captions' tokens with the images kv_index [N] names."""
        return self._fuse_all(image_tokens, text_tokens, attention_mask, kv_index=kv_index)[0]

    @torch.enable_grad()
    def word_maps(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        word_index: Tensor,
        *,
        kind: str = "gradcam",
        normalize: str | None = None,
    ) -> Tensor:
        """Maps [B, W, patches] of the words at word_index [B, W, S] (token positions, -1 pads).

        kind "gradcam": Grad-CAM of the match logit; "attention": the cross-attention alone. Needs no gradient mode
        and leaves every `.grad` untouched.
        """
        if kind not in ("gradcam", "attention"):
            raise ValueError(f"kind: expected 'gradcam' or 'attention', got {kind!r}")
        with torch.no_grad():
            image_tokens = self.backbone.encode_image(images).tokens
            text_tokens, _ = self.encode_text(input_ids, attention_mask)
        fused = self._fuse_all(image_tokens, text_tokens, attention_mask, record_layer=self.config.cam_layer)
        return self._source(*fused).maps(word_index, gradient=kind == "gradcam", normalize=normalize)

    def _fuse_all(
        self,
        image_tokens: Tensor,
        text_tokens: Tensor,
        attention_mask: Tensor,
        *,
        kv_index: Tensor | None = None,
        record_layer: int | None = None,
    ) -> tuple[Tensor, CrossRecord | None, Prepared]:
        """Matching logits [N, 2] of captions' tokens [N, T, D] with the images that kv_index [N] names, or else each
        with its own; and what maps need of them."""
        packing, own = Packing.of(attention_mask), row_numbers(text_tokens)
        fusion = self.backbone.fusion
        prepared = Prepared.of(fusion, image_tokens, packing.pack(text_tokens), packing)
        images = own if kv_index is None else kv_index
        pairs = Pairs(own, images, packing.size, first_tokens(attention_mask), len(own))
        (cls,), record = fuse(fusion, prepared, [pairs], record_layer=record_layer)
        return self.itm_head(cls), record, prepared


def _match_loss(*, match: list[Tensor], mismatch: list[Tensor]) -> Tensor:
    """Cross-entropy of matching logits [N, 2], class 1 for `match`, 0 for `mismatch`, mean over all of them."""
    logits = at_least_fp32(torch.cat(match + mismatch))
    labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    labels[: sum(len(part) for part in match)] = 1
    return F.cross_entropy(logits, labels)
