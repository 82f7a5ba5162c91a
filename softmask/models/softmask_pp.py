"""SoftMask++ (Park & Han, CVPR 2023): ALBEF with text-driven soft masks, a focal contrastive loss and masked text.

One step, as `forward` reads: encode, contrast, fuse the positive pairs, look up where the picture made a pair match
for one word of its caption, fuse the negatives and the soft-masked pairs, predict the masked tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from softmask import ops
from softmask.data import Batch

from .backbone import Backbone, Encoded, momentum_twin, update_twin
from .bert import CrossRecord, ImageKeys, PairIndex, at_least_fp32, initialize
from .config import MAX_TEMPERATURE, MIN_TEMPERATURE, SoftMaskPPConfig, SpecialIds
from .masking import IGNORE, MaskedText, mask_tokens, pick_words, sample_negatives, word_positions

MAX_WORD_TOKENS = 8  # of a longer word, the map is the mean over its first tokens


@dataclass
class SoftMaskPPOutput:
    loss: Tensor
    terms: dict[str, Tensor]  # detached scalars
    image_teacher: Tensor  # [B, embed_dim], for the queue
    text_teacher: Tensor
    image_id: Tensor


@dataclass
class Fused:
    """A fused pass: states [N, T, D], matching logits [N, 2] and, where asked for, what a map needs."""

    states: Tensor
    logits: Tensor
    record: CrossRecord | None


@dataclass
class Step:
    """What the terms of one training step share."""

    batch: Batch
    masked: MaskedText
    input_ids: Tensor  # [B, T], as the encoders read them
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
        self.twin = momentum_twin(self.backbone)
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
        step = self._encode(batch, self.config.alpha if alpha is None else alpha)
        losses = {"itc": self._contrastive(step)}
        if fuse:
            losses |= self._fused_losses(step)
        loss = sum(getattr(self.config.weights, name) * term for name, term in losses.items())
        terms = {name: term.detach() for name, term in losses.items()}
        terms["temperature"] = 1.0 / step.logit_scale.detach()
        return SoftMaskPPOutput(loss, terms, step.image_teacher.feature, step.text_teacher.feature, batch.image_id)

    def update_momentum(self) -> None:
        """EMA of the twin, once per optimizer step, before the forward pass."""
        update_twin(self.twin, self.backbone, self.config.momentum)

    def enqueue(self, output: SoftMaskPPOutput) -> None:
        """Put the batch's teacher features (of all ranks) into the queue, after its loss was found finite."""
        self.contrast.group = self._group()
        self.contrast.enqueue(output.image_teacher, output.text_teacher, ids=output.image_id)

    def _group(self) -> dist.ProcessGroup | None:
        distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return dist.group.WORLD if distributed else None

    def _mask_text(self, input_ids: Tensor) -> MaskedText:
        return mask_tokens(
            input_ids,
            self.special_ids,
            vocab_size=self.config.text.vocab_size,
            probability=self.config.mask_probability,
        )

    def _logit_scale(self) -> Tensor:
        """1 / temperature, clamped in value only: a parameter that left the range can come back."""
        clamped = self.temperature.clamp(MIN_TEMPERATURE, MAX_TEMPERATURE)
        return 1.0 / (self.temperature + (clamped - self.temperature).detach())

    def _encode(self, batch: Batch, alpha: float) -> Step:
        masked = self._mask_text(batch.input_ids)
        input_ids = masked.input_ids if self.config.mask_text == "all" else batch.input_ids
        image = self.backbone.encode_image(batch.images)
        text = self.backbone.encode_text(input_ids, batch.attention_mask)
        with torch.no_grad():
            image_teacher = self.twin.encode_image(batch.images)
            text_teacher = self.twin.encode_text(input_ids, batch.attention_mask)
        return Step(
            batch=batch,
            masked=masked,
            input_ids=input_ids,
            alpha=alpha,
            logit_scale=self._logit_scale(),
            image=image,
            text=text,
            image_teacher=image_teacher,
            text_teacher=text_teacher,
        )

    def _contrastive(self, step: Step) -> Tensor:
        self.contrast.group = self._group()
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
        """Every term that reads words and picture together: itm, itm_soft and mlm."""
        keys = self.backbone.fusion.project(step.image.tokens)
        mask = step.batch.attention_mask
        positive = self._fuse(step.text.tokens, mask, keys, record_layer=self._record_layer())
        key_weight = self._soft_mask(positive, keys, step) if self.config.soft_mask else None
        losses = self._matching(step, keys, positive, key_weight)
        states = positive.states
        if self.config.mask_text == "mlm":
            states = self._fuse_masked(self.backbone, step, keys)
        return losses | {"mlm": self._mlm(states, step)}

    def _record_layer(self) -> int | None:
        return self.config.cam_layer if self.config.soft_mask else None

    def _fuse(
        self,
        text_tokens: Tensor,
        attention_mask: Tensor,
        keys: list[ImageKeys],
        pairs: PairIndex | None = None,
        *,
        record_layer: int | None = None,
    ) -> Fused:
        states, record = self.backbone.fusion(text_tokens, attention_mask, keys, pairs, record_layer=record_layer)
        return Fused(states, self.itm_head(states[:, 0]), record)

    def _word_maps(
        self, fused: Fused, keys: list[ImageKeys], word_index: Tensor, *, gradient: bool, normalize: str | None
    ) -> Tensor:
        """Maps [B, W, P'] of the positive pairs; Grad-CAM of the raw match logit, or the attention alone."""
        layer = self.config.cam_layer
        record, image = fused.record, keys[layer]
        options = {}
        if gradient:
            score = at_least_fp32(fused.logits[:, 1]).sum()
            (grad_output,) = torch.autograd.grad(score, record.output, retain_graph=True)
            options = {"value": image.value, "grad_output": grad_output, "value_bias": record.value_bias}
        return ops.word_attention(
            record.query,
            image.key,
            word_index,
            num_prefix_tokens=self.num_prefix_tokens,
            normalize=normalize,
            **options,
        )

    def _soft_mask(self, positive: Fused, keys: list[ImageKeys], step: Step) -> Tensor:
        """Weight [B, P] of every image token for one random real word of the caption; CLS keeps weight 1."""
        batch, input_ids = step.batch, step.input_ids
        allowed = input_ids == batch.input_ids  # a word that was masked or replaced is not in the caption read
        word = pick_words(batch.word_ids, allowed & (input_ids != self.special_ids.mask))
        index = word_positions(batch.word_ids, word, max_tokens=MAX_WORD_TOKENS)
        maps = self._word_maps(positive, keys, index[:, None], gradient=True, normalize=self.config.normalize)
        return F.pad(1.0 - self.config.strength * maps[:, 0], (self.num_prefix_tokens, 0), value=1.0)

    def _matching(
        self, step: Step, keys: list[ImageKeys], positive: Fused, key_weight: Tensor | None
    ) -> dict[str, Tensor]:
        """ITM and, with `key_weight`, ITM on the soft-masked images; all their pairs in one fused pass.

        Pairs: (hard image, text), (image, hard text), then (masked image, text), (masked image, hard text). The
        soft term's other negative, (hard image, text), is the first of them again.
        """
        text_tokens, attention_mask = step.text.tokens, step.batch.attention_mask
        hard_text, hard_image = self._hard_negatives(step)
        own = torch.arange(len(text_tokens), device=text_tokens.device)
        images, texts = [hard_image, own], [own, hard_text]
        if key_weight is not None:
            images, texts = images + [own], texts + [own]
            if self.config.soft_negatives:
                images, texts = images + [own], texts + [hard_text]
            whole = torch.ones_like(key_weight)
            key_weight = torch.cat([whole, whole] + [key_weight] * (len(images) - 2))
        rows = torch.cat(texts)
        pairs = PairIndex(kv_index=torch.cat(images), key_weight=key_weight)
        logits = self._fuse(text_tokens[rows], attention_mask[rows], keys, pairs).logits.chunk(len(images))
        losses = {"itm": _match_loss(match=[positive.logits], mismatch=[logits[0], logits[1]])}
        if key_weight is not None:
            mismatch = [logits[0], logits[3]] if self.config.soft_negatives else []
            losses["itm_soft"] = _match_loss(match=[logits[2]], mismatch=mismatch)
        return losses

    # -- masked language modelling --------------------------------------------------------------------------------

    def _fuse_masked(self, backbone: Backbone, step: Step, keys: list[ImageKeys]) -> Tensor:
        tokens = backbone.text(step.masked.input_ids, step.batch.attention_mask)
        return backbone.fusion(tokens, step.batch.attention_mask, keys)[0]

    def _mlm(self, states: Tensor, step: Step) -> Tensor:
        """(1 - alpha) * cross-entropy + alpha * soft cross-entropy with the twin, mean over the masked positions."""
        chosen = step.masked.labels != IGNORE
        logits = at_least_fp32(self.backbone.predict_tokens(states[chosen]))  # [M, vocabulary]
        log_p = logits.log_softmax(dim=-1)
        loss = F.nll_loss(log_p, step.masked.labels[chosen], reduction="sum")
        if step.alpha > 0:
            target = self._mlm_target(step, chosen)
            loss = (1.0 - step.alpha) * loss - step.alpha * (target * log_p).sum()
        return loss / max(len(logits), 1)

    @torch.no_grad()
    def _mlm_target(self, step: Step, chosen: Tensor) -> Tensor:
        """The twin's probabilities [M, vocabulary] at the masked positions."""
        keys = self.twin.fusion.project(step.image_teacher.tokens)
        if self.config.mask_text == "mlm":
            states = self._fuse_masked(self.twin, step, keys)
        else:
            states = self.twin.fusion(step.text_teacher.tokens, step.batch.attention_mask, keys)[0]
        return at_least_fp32(self.twin.predict_tokens(states[chosen])).softmax(dim=-1)

    # -- evaluation -----------------------------------------------------------------------------------------------

    def encode_image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B, 3, S, S] -> tokens [B, P, D], normalized feature [B, embed_dim]."""
        encoded = self.backbone.encode_image(images)
        return encoded.tokens, encoded.feature

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """input_ids, attention_mask [B, T] -> tokens [B, T, D], normalized feature [B, embed_dim]."""
        encoded = self.backbone.encode_text(input_ids, attention_mask)
        return encoded.tokens, encoded.feature

    def match(
        self, image_tokens: Tensor, text_tokens: Tensor, attention_mask: Tensor, *, kv_index: Tensor | None = None
    ) -> Tensor:
        """Matching logits [N, 2] (class 1: they match) of N captions' tokens with the images kv_index [N] names."""
        keys = self.backbone.fusion.project(image_tokens)
        return self._fuse(text_tokens, attention_mask, keys, PairIndex(kv_index=kv_index)).logits

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
            text_tokens = self.backbone.encode_text(input_ids, attention_mask).tokens
        keys = self.backbone.fusion.project(image_tokens)
        fused = self._fuse(text_tokens, attention_mask, keys, record_layer=self.config.cam_layer)
        return self._word_maps(fused, keys, word_index, gradient=kind == "gradcam", normalize=normalize)


def _match_loss(*, match: list[Tensor], mismatch: list[Tensor]) -> Tensor:
    """Cross-entropy of matching logits [N, 2], class 1 for `match`, 0 for `mismatch`, mean over all of them."""
    logits = at_least_fp32(torch.cat(match + mismatch))
    labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    labels[: sum(len(part) for part in match)] = 1
    return F.cross_entropy(logits, labels)
