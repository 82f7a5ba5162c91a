"""SyCoCa (Ma et al., ICML 2024): CoCa with an image decoder, and masks that follow the caption.

One step: encode both, contrast, find the patches most relevant to the caption, decode the caption from these patches
alone, and reconstruct them from the rest of the image and the caption.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmask import ops
from softmask.batch import Batch
from softmask.models.config import SpecialIds, check
from softmask.models.layers.momentum import momentum_encoder_of, update_momentum_encoder
from softmask.models.layers.numerics import clamp_value, initialize, weighted_sum
from softmask.models.layers.packing import OutputPositions, Packed, Packing, is_cls_or_sep
from softmask.models.layers.recomputation import all_ranks
from softmask.models.layers.transformer import CrossDecoder
from softmask.models.sycoca.backbone import Backbone, Texts
from softmask.models.sycoca.caption_head import caption_parts
from softmask.models.sycoca.config import MAX_LOGIT_SCALE, SyCoCaConfig
from softmask.models.sycoca.masks import (
    Draws,
    PatchMasks,
    attentive_masks,
    keep_patches,
    patch_positions,
    random_masks,
    replace_patches,
)
from softmask.ranges import named_range


@dataclass
class SyCoCaOutput:
    loss: Tensor
    terms: dict[str, Tensor]  # detached scalars
    image_teacher: Tensor | None = None  # [B, embed_dim], for the queue
    text_teacher: Tensor | None = None


class SyCoCa(nn.Module):
    """The model and its three losses: itc, caption and tgmim. With `reconstruct: false` and `caption_masking: none` it
    is CoCa; `pooler_queries` adds CoCa's pooler.

    The text encoder reads whole captions, [SEP] included, in training and in evaluation. Every token but a caption's
    last predicts the next one.
    """

    def __init__(self, config: SyCoCaConfig, *, special_ids: SpecialIds) -> None:
        if config.text.vocab_size <= special_ids.mask:
            raise ValueError(f"text.vocab_size: expected the tokenizer's, got {config.text.vocab_size}")
        super().__init__()
        self.config, self.special_ids = config, special_ids
        self.backbone = Backbone(config)
        self._check_sizes()
        text = config.text
        self.caption_decoder, self.caption_head = caption_parts(text, image_width=self.backbone.vision.width)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1.0 / config.temperature)))
        if config.reconstruct or config.caption_masking == "pixels":
            self.mask_token = nn.Parameter(torch.empty(self.backbone.vision.width).normal_(std=text.initializer_range))
        if config.reconstruct:
            self._make_image_decoder()
        self.momentum_encoder: Backbone | None = None
        self.contrast: ops.MomentumContrastiveLoss | None = None
        if config.queue_size:
            self.momentum_encoder = momentum_encoder_of(self.backbone)
            self.contrast = ops.MomentumContrastiveLoss(
                config.embed_dim, config.queue_size, alpha=config.alpha, gamma=config.gamma
            )

    def _check_sizes(self) -> None:
        """ValueError where keys do not fit the image encoder."""
        config, width, patches = self.config, self.backbone.vision.width, math.prod(self.patch_grid)
        masked = {"caption_ratio": config.has_caption_loss and config.caption_masking != "none"}
        masked["reconstruct_ratio"] = config.has_reconstruction
        expected = {
            name: (not used or 0 < round(getattr(config, name) * patches) < patches, f"some but not all of {patches}")
            for name, used in masked.items()
        }
        if config.reconstruct:
            fits = width % config.image_decoder_heads == 0
            expected["image_decoder_heads"] = (fits, f"a divisor of the image encoder's width {width}")
        if config.masks == "attentive" and any(masked.values()):
            fits = config.relevance == "projection" or width == config.text.width
            expected["relevance"] = (fits, f"'projection' where widths differ ({width} and {config.text.width})")
        check(config, expected)

    def _make_image_decoder(self) -> None:
        vision, config = self.backbone.vision, self.config
        self.image_decoder = CrossDecoder(
            vision.width,
            config.image_decoder_heads,
            config.image_decoder_layers,
            source_width=config.text.width,
            causal=False,
            library=config.text.attention,
        )
        self.pixel_head = nn.Linear(vision.width, 3 * vision.patch_size**2)
        for part in (self.image_decoder, self.pixel_head):
            initialize(part, std=config.text.initializer_range)
        if config.text.style == "open_clip":
            self.image_decoder.initialize_as_open_clip()
        if config.reconstruct_masking == "tokens":  # a token that is replaced after the encoder has no position
            position = patch_positions(self.patch_grid, vision.width)
            self.register_buffer("patch_position", position, persistent=False)

    # -- properties of the encoders ---------------------------------------------------------------------------------

    @property
    def num_prefix_tokens(self) -> int:
        return self.backbone.vision.num_prefix_tokens

    @property
    def patch_size(self) -> int:
        return self.backbone.vision.patch_size

    @property
    def patch_grid(self) -> tuple[int, int]:
        return self.backbone.vision.patch_grid

    def set_activation_checkpointing(self, enable: bool) -> None:
        self.backbone.vision.set_activation_checkpointing(enable)
        self.backbone.text.activation_checkpointing = enable
        self.caption_decoder.activation_checkpointing = enable
        if self.config.has_reconstruction:
            self.image_decoder.activation_checkpointing = enable

    # -- training -----------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, *, whole: bool = False, draws: Draws | None = None) -> SyCoCaOutput:
        """The loss of one batch; with `whole` the caption decoder sees all patches.

        Call `update_momentum` before it and `enqueue` after it. `draws` replaces random draws of the step.
        """
        config, backbone = self.config, self.backbone
        image = backbone.vision(batch.images)
        texts = self.encode_texts(batch)
        pooled, context = backbone.pool(image)
        scale = self.scale()
        features = backbone.image_feature(pooled), texts.feature
        teachers = self._teachers(batch, texts.packing, *features)
        losses = {"itc": self._contrastive(*features, scale, teachers)}
        masks = self.masks(image, texts, draws, whole=whole)
        encoded = self._encode_masked(batch.images, masks)
        if config.has_caption_loss:
            context = self.decoder_context(image, context, masks.kept, encoded.get("caption"))
            losses["caption"] = self.caption_loss(batch, texts, context)
        if masks.hidden is not None:
            source = self.image_decoder_input(image, masks.hidden, encoded.get("tgmim"))
            losses["tgmim"] = self.reconstruction_loss(batch, texts, source, masks.hidden)
        loss = weighted_sum(losses, config.weights)
        terms = {name: term.detach() for name, term in losses.items()}
        return SyCoCaOutput(loss, terms | {"temperature": 1.0 / scale.detach()}, **teachers)

    def update_momentum(self) -> None:
        """Moves the momentum encoder, if there is one; once per optimizer step, before the forward pass."""
        if self.momentum_encoder is not None:
            update_momentum_encoder(self.momentum_encoder, self.backbone, self.config.momentum)

    def enqueue(self, output: SyCoCaOutput) -> None:
        """Puts the teacher features of all ranks into the queue, if there is one, once the loss is known to be
        finite."""
        if self.contrast is not None and output.image_teacher is not None and output.text_teacher is not None:
            self.contrast.group = all_ranks()
            self.contrast.enqueue(output.image_teacher, output.text_teacher)

    def statistics(self) -> list[Tensor]:
        """Buffers that a forward pass in training changes: BatchNorm's running statistics."""
        return [
            *self.backbone.buffers(),
            *(() if self.momentum_encoder is None else self.momentum_encoder.buffers()),
        ]

    def scale(self) -> Tensor:
        """1 / temperature of the contrastive loss, within CoCa's limit.

        It clamps the logarithm: far beyond the limit, the exponential would cost the clamped value its digits, and its
        gradient would be as large.
        """
        return clamp_value(self.logit_scale, most=math.log(MAX_LOGIT_SCALE)).exp()

    def encode_texts(self, batch: Batch) -> Texts:
        return self.backbone.encode_texts(batch.input_ids, Packing.of(batch.attention_mask, batch.num_tokens))

    @torch.no_grad()
    def _teachers(self, batch: Batch, packing: Packing, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        """The momentum encoder's features image_teacher and text_teacher [B, embed_dim], if there is one. With
        `momentum: 0` they are the model's own, `image` and `text`."""
        teacher = self.momentum_encoder
        if teacher is None:
            return {}
        if self.config.momentum > 0:
            image = teacher.image_feature(teacher.pool(teacher.vision(batch.images))[0])
            text = teacher.encode_texts(batch.input_ids, packing).feature
        return {"image_teacher": image.detach(), "text_teacher": text.detach()}

    @named_range("contrastive loss")
    def _contrastive(self, image: Tensor, text: Tensor, scale: Tensor, teachers: dict[str, Tensor]) -> Tensor:
        if self.contrast is None:
            return ops.focal_contrastive_loss(image, text, scale, gamma=self.config.gamma, group=all_ranks())
        self.contrast.group = all_ranks()
        return self.contrast(image, text, scale, **teachers)

    # -- masks --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    @named_range("masks")
    def masks(self, image: Tensor, texts: Texts, draws: Draws | None = None, *, whole: bool = False) -> PatchMasks:
        """The patches most relevant to the caption or, with `masks: random`, any. `whole`: none for the caption
        decoder."""
        config = self.config
        masked = config.has_caption_loss and config.caption_masking != "none" and not whole
        keep = config.caption_ratio if masked else None
        hide = config.reconstruct_ratio if config.has_reconstruction else None
        ratios = {ratio for ratio in (keep, hide) if ratio is not None}
        if not ratios:
            return PatchMasks(kept=None, hidden=None)
        patches = image[:, self.num_prefix_tokens :]
        if config.masks == "random":
            noise = None if draws is None else draws.patch_noise
            found = random_masks(
                torch.rand(patches.shape[:2], device=patches.device) if noise is None else noise, ratios=ratios
            )
        else:
            tokens = texts.packing.pad(self.backbone.text.normalized(texts.tokens))
            if config.relevance == "projection":
                patches, tokens = self.backbone.project_patches(patches), self.backbone.text_projection(tokens)
            found = attentive_masks(patches, tokens, self._irrelevant(texts), ratios=ratios)
        return PatchMasks(
            kept=None if keep is None else found[keep],
            hidden=None if hide is None else found[hide],
        )

    def _irrelevant(self, texts: Texts) -> Tensor:
        """bool [B, T]: tokens that patches are not compared with."""
        padding = ~texts.packing.mask
        if self.config.relevance_tokens == "all":
            return padding
        return padding | is_cls_or_sep(texts.input_ids, self.special_ids)

    def _encode_masked(self, images: Tensor, masks: PatchMasks) -> dict[str, Tensor]:
        """The image tokens [B, P, D] of each loss, by its name, that masks pixels; one pass for both."""
        unseen: dict[str, Tensor] = {}
        if self.config.caption_masking == "pixels" and masks.kept is not None:
            unseen["caption"] = ~masks.kept
        if self.config.reconstruct_masking == "pixels" and masks.hidden is not None:
            unseen["tgmim"] = masks.hidden
        if not unseen:
            return {}
        tokens = self.backbone.vision(images, masked=torch.cat(list(unseen.values())), mask_token=self.mask_token)
        return dict(zip(unseen, tokens.chunk(len(unseen)), strict=True))

    @named_range("masks")
    def decoder_context(self, image: Tensor, context: Tensor, kept: Tensor | None, encoded: Tensor | None) -> Tensor:
        """What the caption decoder reads, [B, P', D]: the image's `context` or, with masks, the kept patches alone."""
        if self.config.caption_masking == "pixels" and encoded is not None:
            return self.backbone.pool(encoded)[1]
        if self.config.caption_masking == "tokens" and kept is not None:
            ratio = self.config.caption_ratio
            return keep_patches(image, kept, ratio=ratio, num_prefix_tokens=self.num_prefix_tokens)
        return context

    def image_decoder_input(self, image: Tensor, hidden: Tensor, encoded: Tensor | None) -> Tensor:
        """What the image decoder starts from, [B, P, D], without the tokens of the hidden patches."""
        if self.config.reconstruct_masking == "pixels" and encoded is not None:
            return encoded
        return replace_patches(image, hidden, self.mask_token + self.get_buffer("patch_position"))

    # -- caption and reconstruction -----------------------------------------------------------------------------------

    def caption_loss(self, batch: Batch, texts: Texts, context: Tensor) -> Tensor:
        """Cross-entropy of the next token, mean over all tokens that have one; padding is never a target."""
        with named_range("caption decoder"):
            states = self.caption_decoder(texts, Packed.full(context))
        with named_range("caption head and loss"):
            followed, following = (F.pad(x[:, 1:], (0, 1)) for x in (batch.attention_mask, batch.input_ids))
            size = None if batch.num_tokens is None else batch.num_tokens - len(followed)
            chosen = Packing.of(followed, size)
            labels = chosen.pack(following)
            states = states.index_select(0, texts.packing.token_index[chosen.flat_index])
            return self.caption_head(states, labels) / max(len(labels), 1)

    def reconstruction_loss(self, batch: Batch, texts: Texts, source: Tensor, masked: Tensor) -> Tensor:
        """The loss reads the masked patches alone, so the image decoder's last layer computes no others."""
        count = round(self.config.reconstruct_ratio * masked.shape[1])
        with_prefix = F.pad(masked, (self.num_prefix_tokens, 0))
        tokens, patches = (torch.nonzero_static(x.flatten(), size=len(x) * count)[:, 0] for x in (with_prefix, masked))
        outputs = OutputPositions(tokens, Packing.full(len(masked), count, masked.device))
        states = self._decode_image(source, texts, outputs)
        with named_range("pixel head and loss"):
            pixels = self.pixel_head(states)
            prediction = pixels.new_zeros(masked.numel(), pixels.shape[-1]).index_copy(0, patches, pixels)
            return ops.masked_patch_loss(
                prediction.unflatten(0, masked.shape),
                batch.images,
                masked,
                patch_size=self.patch_size,
                normalize=self.config.normalize_pixels,
            )

    @named_range("image decoder")
    def _decode_image(self, source: Tensor, texts: Texts, outputs: OutputPositions | None = None) -> Tensor:
        """source [B, P, D] -> states [B * P, D], or [M, D] with `outputs`."""
        return self.image_decoder(Packed.full(source), texts, outputs=outputs)

    # -- evaluation -----------------------------------------------------------------------------------------------

    def encode_image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B, 3, S, S] -> tokens [B, P, D], normalized feature [B, embed_dim]."""
        tokens = self.backbone.vision(images)
        return tokens, self.backbone.image_feature(self.backbone.pool(tokens)[0])

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """input_ids, attention_mask [B, T], whole captions -> tokens [B, T, D], normalized feature [B, embed_dim]."""
        texts = self.backbone.encode_texts(input_ids, Packing.of(attention_mask))
        return texts.packing.pad(texts.tokens), texts.feature

    def hidden_patches(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """bool [B, patches]: the patches of images, or of their tokens [B, P, D], that training would hide for these
        captions [B, T]."""
        texts = self.backbone.encode_texts(input_ids, Packing.of(attention_mask))
        hidden = self.masks(self.backbone.vision.tokens(images), texts).hidden
        if hidden is None:
            raise ValueError("reconstruct: expected true and weights.tgmim > 0, got a model without reconstruction")
        return hidden

    def reconstruct(self, images: Tensor, hidden: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Pixels [B, patches, 3 * patch_size**2] of images whose patches `hidden` [B, patches] are masked as in
        training, guided by captions [B, T]."""
        texts = self.backbone.encode_texts(input_ids, Packing.of(attention_mask))
        by_pixels = self.config.reconstruct_masking == "pixels"
        masked = {"masked": hidden, "mask_token": self.mask_token} if by_pixels else {}
        image = self.backbone.vision(images, **masked)
        pixels = self.pixel_head(self._decode_image(self.image_decoder_input(image, hidden, image), texts))
        return pixels.unflatten(0, image.shape[:2])[:, self.num_prefix_tokens :]
