"""SoftMask++ (Park & Han, CVPR 2023): ALBEF with text-driven soft masks, a focal contrastive loss and masked text.

One step: encode, contrast, fuse the positive pairs, and compute where in the image one word of the caption made the
pair match. Then one pass fuses the negatives, the soft-masked pairs and the masked captions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmask import ops
from softmask.batch import Batch
from softmask.models.config import MAX_TEMPERATURE, MIN_TEMPERATURE, SpecialIds
from softmask.models.layers.momentum import momentum_encoder_of, update_momentum_encoder
from softmask.models.layers.numerics import at_least_fp32, clamp_value, initialize, weighted_sum
from softmask.models.layers.packing import HostInts, Packing
from softmask.models.layers.recomputation import all_ranks
from softmask.models.layers.token_loss import masked_token_loss
from softmask.models.softmask_pp.backbone import Backbone, Encoded, pooled_tokens
from softmask.models.softmask_pp.config import SoftMaskPPConfig
from softmask.models.softmask_pp.fusion import CrossRecord, ImageKeys
from softmask.models.softmask_pp.maps import MapSource
from softmask.models.softmask_pp.masking import (
    IGNORE,
    Draws,
    mask_tokens,
    pick_words,
    sample_negatives,
    word_positions,
)
from softmask.models.softmask_pp.pairs import (
    Pairs,
    Prepared,
    first_tokens,
    fuse,
    matching_losses,
    row_numbers,
    split_first,
)
from softmask.models.softmask_pp.step import Step
from softmask.ranges import named_range

MAX_WORD_TOKENS = 8  # the map of a longer word is the mean over its first tokens


@dataclass
class SoftMaskPPOutput:
    loss: Tensor
    terms: dict[str, Tensor]  # detached scalars
    image_teacher: Tensor  # [B, embed_dim], for the queue
    text_teacher: Tensor
    image_id: Tensor
    image_weight: Tensor | None = None  # [B, P] soft masks of the image tokens


class SoftMaskPP(nn.Module):
    """The model and its four losses: itc, itm, itm_soft and mlm. With `soft_mask: false`, `gamma: 0` and
    `mask_text: mlm` they are ALBEF's.

    On several ranks the contrastive loss gathers the features of all ranks, with gradients, and every rank's queue
    holds the same rows. Hard negatives come from the rank's own batch.
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

    def forward(
        self, batch: Batch, *, alpha: float | None = None, fuse: bool = True, draws: Draws | None = None
    ) -> SoftMaskPPOutput:
        """The loss of one batch; without `fuse` its contrastive term alone (see `contrast_steps`).

        Call `update_momentum` before it and `enqueue` after it. `draws` replaces random draws of the step.
        """
        if len(batch.images) < 2:
            raise ValueError(f"batch: expected at least 2 pairs (hard negatives), got {len(batch.images)}")
        alpha = self.config.alpha if alpha is None else alpha
        step = self._encode(batch, alpha, draws or Draws(), fuse=fuse)
        losses, image_weight = {"itc": self._contrastive(step)}, None
        if fuse:
            fused, image_weight = self._fused_losses(step)
            losses |= fused
        loss = weighted_sum(losses, self.config.weights)
        terms = {name: term.detach() for name, term in losses.items()}
        terms["temperature"] = 1.0 / step.logit_scale.detach()
        teachers = step.image_teacher.feature, step.text_teacher.feature
        return SoftMaskPPOutput(loss, terms, *teachers, batch.image_id, image_weight)

    def update_momentum(self) -> None:
        """Moves the momentum encoder; once per optimizer step, before the forward pass."""
        update_momentum_encoder(self.momentum_encoder, self.backbone, self.config.momentum)

    def enqueue(self, output: SoftMaskPPOutput) -> None:
        """Puts the teacher features of all ranks into the queue, once the loss is known to be finite."""
        self.contrast.group = all_ranks()
        self.contrast.enqueue(output.image_teacher, output.text_teacher, ids=output.image_id)

    def statistics(self) -> list[Tensor]:
        """Buffers that a forward pass in training changes: BatchNorm's running statistics."""
        return [*self.backbone.buffers(), *self.momentum_encoder.buffers()]

    def _logit_scale(self) -> Tensor:
        """1 / temperature, within ALBEF's limits."""
        return 1.0 / clamp_value(self.temperature, least=MIN_TEMPERATURE, most=MAX_TEMPERATURE)

    # -- encoders and the contrastive term ----------------------------------------------------------------------------

    @property
    def _masked_pass(self) -> bool:
        """Whether MLM reads masked captions in a pass of its own."""
        return self.config.mask_text == "mlm" and self.config.weights.mlm > 0

    def _encode(self, batch: Batch, alpha: float, draws: Draws, *, fuse: bool) -> Step:
        """Without `fuse` captions are whole: masks are for steps that learn to fill them."""
        text = draws.masked or mask_tokens(
            batch.input_ids,
            self.special_ids,
            vocab_size=self.config.text.vocab_size,
            probability=self.config.mask_probability,
        )
        chosen = (text.labels != IGNORE).sum(1)
        ids = text.input_ids if fuse and self.config.mask_text == "all" else batch.input_ids
        packing = captions = Packing.of(batch.attention_mask, batch.num_tokens)
        if fuse and self._masked_pass:
            ids, captions = torch.cat([ids, text.input_ids]), Packing.cat([packing, packing])
        pooled = pooled_tokens(batch.input_ids, packing.mask, self.special_ids, pool=self.config.text.pool)
        inputs = batch.images, ids, captions, packing, pooled
        image, student = self._encode_pairs(self.backbone, *inputs)
        image_teacher, text_teacher = image.detach(), student.detach()
        if self.config.momentum > 0:  # else the momentum encoder is the model, and needs no pass
            with torch.no_grad():
                image_teacher, text_teacher = self._encode_pairs(self.momentum_encoder, *inputs)
        return Step(
            batch=batch,
            draws=draws,
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
        backbone: Backbone, images: Tensor, ids: Tensor, captions: Packing, packing: Packing, pooled: Tensor
    ) -> tuple[Encoded, Encoded]:
        """Encodes images and all captions; the captions of `packing`, which come first, get features."""
        image, tokens = backbone.encode_image(images), backbone.text(ids, captions)
        return image, Encoded(tokens, backbone.text_feature(tokens[: packing.size], packing, pooled))

    @named_range("contrastive loss")
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
    @named_range("contrastive loss")
    def _hard_negatives(self, step: Step) -> tuple[Tensor, Tensor]:
        """A caption for every image [B] and an image for every caption [B], by their similarity to the teacher's."""
        ids, given = step.batch.image_id, step.draws
        text_logits, image_logits = self.negative_logits(step)
        texts = sample_negatives(text_logits, ids) if given.hard_text is None else given.hard_text
        images = sample_negatives(image_logits, ids) if given.hard_image is None else given.hard_image
        return texts, images

    def negative_logits(self, step: Step) -> tuple[Tensor, Tensor]:
        """Logits [B, B] that hard negatives are drawn from: captions for images, images for captions."""
        temperature = self.config.negative_temperature
        scale = 1.0 / temperature if temperature else step.logit_scale
        texts = scale * step.image.feature @ step.text_teacher.feature.T
        return texts, scale * step.text.feature @ step.image_teacher.feature.T

    # -- fusion -------------------------------------------------------------------------------------------------------

    def _fused_losses(self, step: Step) -> tuple[dict[str, Tensor], Tensor | None]:
        """The terms that read captions and images together, itm, itm_soft and mlm, and the soft masks [B, P]."""
        words = self._words(step) if self.config.soft_mask else None
        hard_text, hard_image = self._hard_negatives(step)
        hard_tokens = HostInts(step.batch.attention_mask.sum(1)[hard_text].sum())
        student = self._prepare(self.backbone, step.image, step.text, step)
        teacher, with_mlm = None, self.config.weights.mlm > 0
        teacher_maps = self.config.soft_mask and self.config.cam_source == "momentum"
        if teacher_maps or (step.alpha > 0 and with_mlm):
            with torch.no_grad():
                teacher = self._prepare(self.momentum_encoder, step.image_teacher, step.text_teacher, step)
        positive, masked_pairs = self._positive_pairs(step), self._masked_pairs(step)
        most_masked = step.chosen.read()[1]
        read, longest = positive, 1
        if with_mlm and not self._masked_pass:  # MLM reads the positive pairs
            read, longest = positive.with_chosen(masked_pairs), 1 + most_masked
        record_layer = self.config.cam_layer if self.config.soft_mask else None
        (states,), record = fuse(self.backbone.fusion, student, [read], longest=longest, record_layer=record_layer)
        cls, masked = split_first(states, read)
        match = self.itm_head(cls)
        key_weight = None
        if words is not None:
            source = self._map_source(positive, student, teacher, self._source(match, record, student))
            key_weight = self._soft_mask(source, words)
        kinds = self._other_pairs(step, hard_text, hard_image, hard_tokens.read()[0], key_weight)
        kinds += [masked_pairs] if self._masked_pass else []
        others, _ = fuse(self.backbone.fusion, student, kinds, longest=max(most_masked, 1))
        masked = others.pop() if self._masked_pass else masked
        losses = matching_losses(match, self.itm_head(torch.cat(others)).chunk(len(others)))
        if with_mlm:
            losses["mlm"] = self._mlm(masked, masked_pairs, teacher, step)
        return losses, key_weight

    @staticmethod
    def _prepare(backbone: Backbone, image: Encoded, text: Encoded, step: Step) -> Prepared:
        return Prepared.of(backbone.fusion, image.tokens, text.tokens, step.captions)

    def _positive_pairs(self, step: Step) -> Pairs:
        own = row_numbers(step.batch.images)
        return Pairs(own, own, step.tokens, first_tokens(step.batch.attention_mask), len(own))

    def _masked_pairs(self, step: Step) -> Pairs:
        """MLM's captions with their images."""
        own = row_numbers(step.batch.images)
        texts = own + len(own) if self._masked_pass else own
        return Pairs(texts, own, step.tokens, step.labels != IGNORE, step.chosen.read()[0])

    def _other_pairs(
        self, step: Step, hard_text: Tensor, hard_image: Tensor, hard_tokens: int, key_weight: Tensor | None
    ) -> list[Pairs]:
        """(hard image, caption) and (image, hard caption); with `key_weight` also (masked image, caption) and (masked
        image, hard caption). The soft term uses (hard image, caption), too.
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

    # -- soft masks -------------------------------------------------------------------------------------------------

    @named_range("soft mask")
    def _map_source(self, positive: Pairs, student: Prepared, teacher: Prepared | None, online: MapSource) -> MapSource:
        """What `cam_source` computes the maps of the positive pairs from."""
        layer = self.config.cam_layer
        if self.config.cam_source == "online":
            return online
        if self.config.cam_source == "momentum":
            assert teacher is not None
            fusion, prepared = self.momentum_encoder.fusion, teacher
        else:
            fusion, prepared = self.backbone.fusion, student.detach()
        (cls,), record = fuse(fusion, prepared, [positive], record_layer=layer, grad_from=layer)
        return self._source(self.itm_head(cls), record, prepared)

    def _source(self, match: Tensor, record: CrossRecord | None, prepared: Prepared) -> MapSource:
        assert record is not None  # of the layer `cam_layer`
        return MapSource(match[:, 1], record, prepared.keys[self.config.cam_layer], self.num_prefix_tokens)

    def _words(self, step: Step) -> Tensor:
        """Token positions [B, S] of one random word of every caption, -1 pads."""
        if step.draws.word_index is not None:
            return step.draws.word_index
        batch, input_ids = step.batch, step.input_ids
        allowed = input_ids == batch.input_ids  # not a word that was masked or replaced
        word = pick_words(batch.word_ids, allowed & (input_ids != self.special_ids.mask))
        return word_positions(batch.word_ids, word, max_tokens=MAX_WORD_TOKENS)

    @named_range("soft mask")
    def _soft_mask(self, source: MapSource, words: Tensor) -> Tensor:
        """Weights [B, P] of the image tokens, for the words at [B, S]; prefix tokens keep weight 1."""
        maps = source.maps(words[:, None], normalize=self.config.normalize)
        return F.pad(1.0 - self.config.strength * maps[:, 0], (self.num_prefix_tokens, 0), value=1.0)

    # -- masked language modelling --------------------------------------------------------------------------------

    @named_range("masked tokens")
    def _mlm(self, states: Tensor, pairs: Pairs, teacher: Prepared | None, step: Step) -> Tensor:
        """``(1 - alpha) CE(logits, labels) + alpha CE(logits, softmax(teacher))``, mean over the masked positions."""
        logits = at_least_fp32(self.backbone.predict_tokens(states))  # [M, vocabulary]
        labels = step.labels.flatten()[pairs.chosen_index]
        targets = None
        if step.alpha > 0:
            assert teacher is not None
            with torch.no_grad():
                (teacher_states,), _ = fuse(
                    self.momentum_encoder.fusion, teacher, [pairs], longest=max(step.chosen.read()[1], 1)
                )
                targets = self.momentum_encoder.predict_tokens(teacher_states)
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
        pooled = pooled_tokens(input_ids, packing.mask, self.special_ids, pool=self.config.text.pool)
        return packing.pad(tokens), self.backbone.text_feature(tokens, packing, pooled)

    def image_keys(self, image_tokens: Tensor) -> list[ImageKeys]:
        """What `match` reads of images, projected once for all passes: image_tokens [B, P, D] -> one for each layer."""
        return self.backbone.fusion.project(image_tokens)

    def match(self, keys: list[ImageKeys], text_tokens: Tensor, attention_mask: Tensor, *, kv_index: Tensor) -> Tensor:
        """Logits [N, 2] (class 1: match) of N captions with the images of `image_keys` that kv_index [N] names."""
        return self._fuse_all(keys, text_tokens, attention_mask, kv_index=kv_index)[0]

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
        kv_index: Tensor | None = None,
    ) -> Tensor:
        """Maps [N, W, patches] of the words at word_index [N, W, S] (token positions, -1 pads), over the images, or
        their tokens [B, P, D], that kv_index [N] names (None: one each).

        kind "gradcam": Grad-CAM of the match logit; "attention": the cross-attention alone. Works under no_grad and
        leaves every `.grad` untouched.
        """
        if kind not in ("gradcam", "attention"):
            raise ValueError(f"kind: expected 'gradcam' or 'attention', got {kind!r}")
        with torch.no_grad():
            keys = self.image_keys(self.backbone.vision.tokens(images))
            text_tokens, _ = self.encode_text(input_ids, attention_mask)
        layer = self.config.cam_layer
        fused = self._fuse_all(keys, text_tokens, attention_mask, kv_index=kv_index, record_layer=layer)
        source = self._source(*fused).of(kv_index)
        return source.maps(word_index, gradient=kind == "gradcam", normalize=normalize)

    def _fuse_all(
        self,
        keys: list[ImageKeys],
        text_tokens: Tensor,
        attention_mask: Tensor,
        *,
        kv_index: Tensor | None = None,
        record_layer: int | None = None,
    ) -> tuple[Tensor, CrossRecord | None, Prepared]:
        """Matching logits [N, 2] of captions [N, T, D] with the images that kv_index [N] names (None: one each), and
        what maps need."""
        packing, own = Packing.of(attention_mask), row_numbers(text_tokens)
        prepared = Prepared(self.backbone.fusion.start(packing.pack(text_tokens), packing), keys)
        pairs = Pairs(own, own if kv_index is None else kv_index, packing.size, first_tokens(attention_mask), len(own))
        (cls,), record = fuse(self.backbone.fusion, prepared, [pairs], record_layer=record_layer)
        return self.itm_head(cls), record, prepared
