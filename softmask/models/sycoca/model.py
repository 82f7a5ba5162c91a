"""SyCoCa (Ma et al., ICML 2024): CoCa with an image decoder, and masks that follow what the caption speaks of.

One step, as `forward` reads: encode both, contrast, find the patches that the caption speaks of, tell the caption from
those alone, and paint them again from the rest of the image and the caption.
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
from softmask.models.layers.momentum import update_momentum_encoder
from softmask.models.layers.numerics import clamp_value, initialize
from softmask.models.layers.packing import OutputPositions, Packing
from softmask.models.layers.recomputation import all_ranks
from softmask.models.layers.transformer import CrossDecoder
from softmask.models.sycoca.caption_head import CaptionHead
from softmask.models.sycoca.config import MAX_LOGIT_SCALE, SyCoCaConfig
from softmask.models.sycoca.encoders import Encoders, Texts
from softmask.models.sycoca.masks import (
    PatchMasks,
    attentive_masks,
    keep_patches,
    patch_positions,
    random_masks,
    replace_patches,
)


@dataclass
class SyCoCaOutput:
    loss: Tensor
    terms: dict[str, Tensor]  # detached scalars
    image_teacher: Tensor | None = None  # [B, embed_dim], for the queue
    text_teacher: Tensor | None = None


class SyCoCa(Encoders):
    """The model and its three losses. With `reconstruct` and `caption_masking` off it is CoCa, with `pooler_queries`
    CoCa with its pooler.

    The text encoder reads whole captions, [SEP] included, in training as in evaluation; all tokens of a caption but its
    last have a next one that is told.
    """

    def __init__(self, config: SyCoCaConfig, *, special_ids: SpecialIds) -> None:
        if config.text.vocab_size <= special_ids.mask:
            raise ValueError(f"text.vocab_size: expected the tokenizer's, got {config.text.vocab_size}")
        super().__init__(config)
        self.config, self.special_ids = config, special_ids
        self._check_sizes()
        text = config.text
        self.caption_decoder = CrossDecoder(
            text.width,
            text.heads,
            text.decoder_layers,
            source_width=self.vision.width,
            causal=True,
            library=text.attention,
        )
        self.caption_head = CaptionHead(text.width, text.vocab_size, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1.0 / config.temperature)))
        for part in (self.caption_decoder, self.caption_head):
            initialize(part, std=text.initializer_range)
        if text.style == "open_clip":
            self.caption_decoder.initialize_as_open_clip()
            nn.init.normal_(self.caption_head.weight, std=text.width**-0.5)
        if config.reconstruct or config.caption_masking == "pixels":
            self.mask_token = nn.Parameter(torch.empty(self.vision.width).normal_(std=text.initializer_range))
        if config.reconstruct:
            self._make_image_decoder()
        self.momentum_encoder, self.contrast = None, None
        if config.queue_size:
            self._make_momentum_encoder()

    def _check_sizes(self) -> None:
        """ValueError where keys do not fit the image encoder."""
        config, width, patches = self.config, self.vision.width, math.prod(self.patch_grid)
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
        width, config = self.vision.width, self.config
        self.image_decoder = CrossDecoder(
            width,
            config.image_decoder_heads,
            config.image_decoder_layers,
            source_width=config.text.width,
            causal=False,
            library=config.text.attention,
        )
        self.pixel_head = nn.Linear(width, 3 * self.vision.patch_size**2)
        for part in (self.image_decoder, self.pixel_head):
            initialize(part, std=config.text.initializer_range)
        if config.text.style == "open_clip":
            self.image_decoder.initialize_as_open_clip()
        if config.reconstruct_masking == "tokens":  # what is replaced after the encoder has lost its position
            self.register_buffer("patch_position", patch_positions(self.patch_grid, width), persistent=False)

    def _make_momentum_encoder(self) -> None:
        config, teacher, own = self.config, Encoders(self.config), self.state_dict()
        teacher.load_state_dict({name: own[name] for name in teacher.state_dict()})
        self.momentum_encoder = teacher.requires_grad_(False)
        self.contrast = ops.MomentumContrastiveLoss(
            config.embed_dim, config.queue_size, alpha=config.alpha, gamma=config.gamma
        )

    # -- training -----------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> SyCoCaOutput:
        config = self.config
        image = self.vision(batch.images)
        texts = self._encode_text(batch)
        pooled, context = self.pool(image)
        scale = self.scale()
        teachers = self._teachers(batch, texts.packing)
        losses = {"itc": self._contrastive(self.image_feature(pooled), texts.feature, scale, teachers)}
        masks = self._masks(image, texts)
        encoded = self._encode_masked(batch.images, masks)
        if config.has_caption_loss:
            decoder_context = self._decoder_context(image, context, masks.kept, encoded.get("caption"))
            losses["caption"] = self._caption_loss(batch, texts, decoder_context)
        if config.has_reconstruction:
            image_decoder_input = self._image_decoder_input(image, masks.hidden, encoded.get("tgmim"))
            losses["tgmim"] = self._reconstruction_loss(batch, texts, image_decoder_input, masks.hidden)
        loss = sum(getattr(config.weights, name) * term for name, term in losses.items())
        terms = {name: term.detach() for name, term in losses.items()}
        return SyCoCaOutput(loss, terms | {"temperature": 1.0 / scale.detach()}, **teachers)

    def update_momentum(self) -> None:
        """EMA of the momentum encoder, where there is one, once per optimizer step, before the forward pass."""
        if self.momentum_encoder is not None:
            update_momentum_encoder(self.momentum_encoder, self, self.config.momentum)

    def enqueue(self, output: SyCoCaOutput) -> None:
        """Put the batch's teacher features (of all ranks) into the queue, where there is one, after its loss was found
        finite."""
        if self.contrast is not None:
            self.contrast.group = all_ranks()
            self.contrast.enqueue(output.image_teacher, output.text_teacher)

    def statistics(self) -> list[Tensor]:
        """What a forward pass in training changes: BatchNorm's running statistics."""
        return [*self.vision.buffers(), *(() if self.momentum_encoder is None else self.momentum_encoder.buffers())]

    def set_activation_checkpointing(self, enable: bool) -> None:
        self.vision.set_activation_checkpointing(enable)
        painters = [self.image_decoder] if self.config.has_reconstruction else []
        for part in [self.text, self.caption_decoder, *painters]:
            part.activation_checkpointing = enable

    def scale(self) -> Tensor:
        """1 / temperature of the contrastive loss, within CoCa's limit.

        The logarithm is clamped: far beyond the limit, where nothing holds the parameter, its exponential would take
        the digits of the clamped value with it, and its gradient would be as large.
        """
        return clamp_value(self.logit_scale, most=math.log(MAX_LOGIT_SCALE)).exp()

    def _encode_text(self, batch: Batch) -> Texts:
        return self.read(batch.input_ids, Packing.of(batch.attention_mask, batch.num_tokens))

    @torch.no_grad()
    def _teachers(self, batch: Batch, packing: Packing) -> dict[str, Tensor]:
        """image_teacher and text_teacher [B, embed_dim], the features by the momentum encoder; none without one."""
        if self.momentum_encoder is None:
            return {}
        image = self.momentum_encoder.image_feature(
            self.momentum_encoder.pool(self.momentum_encoder.vision(batch.images))[0]
        )
        return {"image_teacher": image, "text_teacher": self.momentum_encoder.read(batch.input_ids, packing).feature}

    def _contrastive(self, image: Tensor, text: Tensor, scale: Tensor, teachers: dict[str, Tensor]) -> Tensor:
        if self.contrast is None:
            return ops.focal_contrastive_loss(image, text, scale, gamma=self.config.gamma, group=all_ranks())
        self.contrast.group = all_ranks()
        return self.contrast(image, text, scale, **teachers)

    @torch.no_grad()
    def _masks(self, image: Tensor, texts: Texts) -> PatchMasks:
        """The patches most relevant to the caption; or any."""
        config = self.config
        keep = config.caption_ratio if config.has_caption_loss and config.caption_masking != "none" else None
        hide = config.reconstruct_ratio if config.has_reconstruction else None
        ratios = {ratio for ratio in (keep, hide) if ratio is not None}
        if not ratios:
            return PatchMasks(kept=None, hidden=None)
        patches = image[:, self.num_prefix_tokens :]
        if config.masks == "random":
            spoken = random_masks(patches, ratios=ratios)
        else:
            tokens = texts.packing.pad(self.text.normalized(texts.tokens))
            if config.relevance == "projection":
                patches, tokens = self.project_patches(patches), self.text_projection(tokens)
            spoken = attentive_masks(patches, tokens, self._irrelevant(texts), ratios=ratios)
        return PatchMasks(kept=spoken.get(keep), hidden=spoken.get(hide))

    def _irrelevant(self, texts: Texts) -> Tensor:
        """bool [B, T]: tokens that no patch is compared with."""
        padding = ~texts.packing.mask
        if self.config.relevance_tokens == "all":
            return padding
        return padding | (texts.input_ids == self.special_ids.cls) | (texts.input_ids == self.special_ids.sep)

    def _encode_masked(self, images: Tensor, masks: PatchMasks) -> dict[str, Tensor]:
        """The image tokens [B, P, D] of the heads, by name, whose masks are of pixels; one pass for both."""
        unseen = {}
        if self.config.caption_masking == "pixels" and masks.kept is not None:
            unseen["caption"] = ~masks.kept
        if self.config.has_reconstruction and self.config.reconstruct_masking == "pixels":
            unseen["tgmim"] = masks.hidden
        if not unseen:
            return {}
        tokens = self.vision(images, masked=torch.cat(list(unseen.values())), mask_token=self.mask_token)
        return dict(zip(unseen, tokens.chunk(len(unseen)), strict=True))

    def _decoder_context(self, image: Tensor, readable: Tensor, kept: Tensor | None, encoded: Tensor | None) -> Tensor:
        """What the caption's decoder reads, [B, P', D]: all that is `readable`, or what is left by `kept`."""
        if self.config.caption_masking == "pixels":
            return self.pool(encoded)[1]
        if self.config.caption_masking == "tokens":
            options = {"ratio": self.config.caption_ratio, "num_prefix_tokens": self.num_prefix_tokens}
            return keep_patches(image, kept, **options)
        return readable

    def _image_decoder_input(self, image: Tensor, hidden: Tensor, encoded: Tensor | None) -> Tensor:
        """What the image decoder begins with, [B, P, D]: without the tokens of the patches `hidden`."""
        if self.config.reconstruct_masking == "pixels":
            return encoded
        return replace_patches(image, hidden, self.mask_token + self.patch_position)

    def _caption_loss(self, batch: Batch, texts: Texts, image: Tensor) -> Tensor:
        """Cross-entropy of the next token, mean over all that follow a token; padding is never a target."""
        image_packing = Packing.full(*image.shape[:2], image.device)
        states = self.caption_decoder(texts.tokens, texts.packing, image.flatten(0, 1), image_packing)
        followed, following = (F.pad(x[:, 1:], (0, 1)) for x in (batch.attention_mask, batch.input_ids))
        size = None if batch.num_tokens is None else batch.num_tokens - len(followed)
        chosen = Packing.of(followed, size)
        labels = chosen.pack(following)
        told = states.index_select(0, texts.packing.token_index[chosen.flat_index])
        return self.caption_head(told, labels) / max(len(labels), 1)

    def _reconstruction_loss(self, batch: Batch, texts: Texts, image: Tensor, masked: Tensor) -> Tensor:
        """The loss reads the masked patches alone, so the image decoder's last layer makes no others."""
        count = round(self.config.reconstruct_ratio * masked.shape[1])
        seen = F.pad(masked, (self.num_prefix_tokens, 0))
        index, place = (torch.nonzero_static(x.flatten(), size=len(x) * count)[:, 0] for x in (seen, masked))
        pixels = self._paint(
            image, texts, outputs=OutputPositions(index, Packing.full(len(masked), count, masked.device))
        )
        prediction = pixels.new_zeros(masked.numel(), pixels.shape[-1]).index_copy(0, place, pixels)
        options = {"patch_size": self.vision.patch_size, "normalize": self.config.normalize_pixels}
        return ops.masked_patch_loss(prediction.unflatten(0, masked.shape), batch.images, masked, **options)

    def _paint(self, image: Tensor, texts: Texts, *, outputs: OutputPositions | None = None) -> Tensor:
        """image [B, P, D], the masked tokens -> pixels [B * P, 3 * patch_size**2], or [M, ...] of `outputs` alone."""
        image_packing = Packing.full(*image.shape[:2], image.device)
        return self.pixel_head(
            self.image_decoder(image.flatten(0, 1), image_packing, texts.tokens, texts.packing, outputs=outputs)
        )

    def reconstruct(self, images: Tensor, masked: Tensor, texts: Texts) -> Tensor:
        """Pixels [B, patches, 3 * patch_size**2] of images whose patches `masked` [B, patches] are hidden as in
        training: from the encoder or, by `reconstruct_masking: tokens`, behind it."""
        by_pixels = self.config.reconstruct_masking == "pixels"
        hidden = {"masked": masked, "mask_token": self.mask_token} if by_pixels else {}
        image = self.vision(images, **hidden)
        pixels = self._paint(self._image_decoder_input(image, masked, image), texts)
        return pixels.unflatten(0, image.shape[:2])[:, self.num_prefix_tokens :]

    # -- evaluation -----------------------------------------------------------------------------------------------

    @property
    def num_prefix_tokens(self) -> int:
        return self.vision.num_prefix_tokens

    @property
    def patch_size(self) -> int:
        return self.vision.patch_size

    @property
    def patch_grid(self) -> tuple[int, int]:
        return self.vision.patch_grid

    def encode_image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B, 3, S, S] -> tokens [B, P, D], normalized feature [B, embed_dim]."""
        tokens = self.vision(images)
        return tokens, self.image_feature(self.pool(tokens)[0])

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """input_ids, attention_mask [B, T], whole captions -> tokens [B, T, D], normalized feature [B, embed_dim]."""
        texts = self.read(input_ids, Packing.of(attention_mask))
        return texts.packing.pad(texts.tokens), texts.feature

    def hidden_patches(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """bool [B, patches]: what training would hide of images with these captions [B, T]."""
        return self._masks(self.vision(images), self.read(input_ids, Packing.of(attention_mask))).hidden

    def repaint(self, images: Tensor, hidden: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Pixels [B, patches, 3 * patch_size**2] of images with hidden patches, guided by captions [B, T]."""
        return self.reconstruct(images, hidden, self.read(input_ids, Packing.of(attention_mask)))
