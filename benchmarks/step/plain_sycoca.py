"""SyCoCa's training step as an extension of open_clip's CoCa would write it, in plain PyTorch: the reference of the
step benchmark.

Captions are padded to `max_positions`. Attention is materialized with additive masks; all similarities of patches and
tokens are kept and sorted; every cross-attention projects the whole image, whatever its mask. Every position has logits
over the vocabulary, and every patch an error, although only the masked ones count.

It reads the weights of a SyCoCa and shares only its image encoder and feed-forwards. CLS has the position after the
caption's last token or, with `text.style: open_clip`, the one after the padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmask.data import Batch
from softmask.models import SyCoCa
from softmask.models.config import check
from softmask.models.layers.numerics import at_least_fp32
from softmask.models.layers.transformer import Attention, CrossDecoder

MAX_LOGIT_SCALE = 100.0
PUBLISHED = {
    "gamma": 0.0,
    "masks": "attentive",
    "relevance": "projection",
    "caption_masking": "tokens",
    "reconstruct": True,
    "reconstruct_masking": "pixels",
    "normalize_pixels": True,
    "pooler_queries": 0,
    "queue_size": 0,
}


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """bool -> 0 where allowed, -inf elsewhere."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, float("-inf"))


def attention(block: Attention, x: Tensor, source: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
    """x [B, T, D] plus its attention to source [B, P, D'] or to itself; `mask` is added to the logits [B, H, T, P]."""
    asking = block.norm(x)
    told = asking if source is None else block.source_norm(source)
    projected = (block.query(asking), block.key(told), block.value(told))
    query, key, value = (y.unflatten(-1, (block.heads, -1)).transpose(1, 2) for y in projected)
    logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    logits = logits if mask is None else logits + mask
    return x + block.output((logits.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))


def patches_of(images: Tensor, size: int) -> Tensor:
    """[B, 3, H, W] -> [B, patches, 3 * size**2], a patch's pixels by rows, columns and channels."""
    rows = images.unfold(2, size, size).unfold(3, size, size)  # [B, 3, H / size, W / size, size, size]
    return rows.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


class PlainSyCoCa:
    """Computes the losses by name, for a SyCoCaConfig with the published options.

    Raises:
        ValueError: an option has another value.
    """

    def __init__(self, model: SyCoCa) -> None:
        self.model, self.backbone, self.config = model, model.backbone, model.config
        self.pad = model.special_ids.pad
        options = {name: (getattr(self.config, name) == value, repr(value)) for name, value in PUBLISHED.items()}
        check(self.config, options)

    @property
    def open_clip(self) -> bool:
        return self.config.text.style == "open_clip"

    # -- networks -----------------------------------------------------------------------------------------------------

    def causal(self, length: int, like: Tensor) -> Tensor:
        """[T, T]"""
        return torch.full((length, length), float("-inf"), dtype=like.dtype, device=like.device).triu_(1)

    def text(self, ids: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """ids, real [B, T] -> tokens [B, T, D], CLS [B, D]."""
        part = self.backbone.text
        words = part.word(ids)
        position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        last = (
            torch.full_like(ids[:, :1], self.config.text.max_positions) if self.open_clip else real.sum(1, keepdim=True)
        )
        position = torch.cat([position, last], dim=1)
        x = torch.cat([words, part.cls.expand(len(ids), 1, -1)], dim=1) + part.position(position)
        seen = additive(F.pad(real, (0, 1), value=True), x.dtype)[:, None, None]
        mask = self.causal(x.shape[1], x) + seen  # [B, 1, T + 1, T + 1]
        for block in part.blocks:
            x = block.feed_forward(attention(block.attention, x, mask=mask))
        return x[:, :-1] if self.open_clip else part.norm(x[:, :-1]), part.norm(x[:, -1])

    def decode(self, decoder: CrossDecoder, x: Tensor, source: Tensor, *, own: Tensor | None, seen: Tensor) -> Tensor:
        """x [B, T, D] attends to itself by the mask `own` [T, T] and to what is `seen` [B, P] of source [B, P, D'] ->
        [B, T, D]."""
        mask = additive(seen, x.dtype)[:, None, None]
        for self_block, cross_block in zip(decoder.own, decoder.cross, strict=True):
            x = self_block.feed_forward(attention(self_block.attention, x, mask=own))
            x = cross_block.feed_forward(attention(cross_block.attention, x, source, mask=mask))
        return decoder.norm(x)

    def caption_decoder(self, tokens: Tensor, image: Tensor, seen: Tensor) -> Tensor:
        own = self.causal(tokens.shape[1], tokens)
        return self.decode(self.model.caption_decoder, tokens, image, own=own, seen=seen)

    def image_decoder(self, image: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
        return self.decode(self.model.image_decoder, image, tokens, own=None, seen=real)

    # -- the step ---------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        ids = F.pad(batch.input_ids, (0, self.config.text.max_positions - batch.input_ids.shape[1]), value=self.pad)
        labels, ids = ids[:, 1:], ids[:, :-1]
        real = ids != self.pad
        image = self.backbone.vision(batch.images)
        tokens, cls = self.text(ids, real)
        losses = {"itc": self.contrastive(image, cls)}
        kept, hidden = self.spoken_patches(image, tokens, real)
        losses["caption"] = self.caption(tokens, labels, image, kept)
        losses["tgmim"] = self.reconstruction(batch.images, hidden, tokens, real)
        return losses

    @staticmethod
    def feature(projection: nn.Module, states: Tensor) -> Tensor:
        return F.normalize(at_least_fp32(projection(states)), dim=-1)

    def contrastive(self, image: Tensor, cls: Tensor) -> Tensor:
        image = self.feature(self.backbone.image_projection, self.backbone.vision.pool(image))
        text = self.feature(self.backbone.text_projection, cls)
        logits = self.model.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE) * image @ text.T
        own = torch.arange(len(image), device=image.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    @torch.no_grad()
    def spoken_patches(self, image: Tensor, tokens: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """The patches most similar to one of the caption's tokens, as many as each head wants: two bool [B,
        patches]."""
        patches = self.feature(self.backbone.image_projection, image[:, self.backbone.vision.num_prefix_tokens :])
        tokens = self.backbone.text.norm(tokens) if self.open_clip else tokens
        similarity = patches @ self.feature(self.backbone.text_projection, tokens).transpose(-1, -2)  # [B, patches, T]
        relevance = similarity.masked_fill(~real[:, None], float("-inf")).amax(dim=-1)
        order = relevance.argsort(dim=1, descending=True)
        counts = (round(ratio * order.shape[1]) for ratio in (self.config.caption_ratio, self.config.reconstruct_ratio))
        nothing = torch.zeros_like(order, dtype=torch.bool)
        kept, hidden = (nothing.scatter(1, order[:, :count], True) for count in counts)
        return kept, hidden

    def caption(self, tokens: Tensor, labels: Tensor, image: Tensor, kept: Tensor) -> Tensor:
        seen = F.pad(kept, (self.backbone.vision.num_prefix_tokens, 0), value=True)
        logits = at_least_fp32(self.model.caption_head(self.caption_decoder(tokens, image, seen)))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=self.pad)

    def reconstruction(self, images: Tensor, masked: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
        vision = self.backbone.vision
        image = vision(images, masked=masked, mask_token=self.model.mask_token)
        states = self.image_decoder(image, tokens, real)
        prediction = self.model.pixel_head(states[:, vision.num_prefix_tokens :])
        target = patches_of(images, vision.patch_size)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        error = (prediction - target).square().mean(-1)
        return (error * masked).sum() / masked.sum()
