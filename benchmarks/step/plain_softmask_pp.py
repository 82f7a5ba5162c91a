"""SoftMask++'s training step as ALBEF's recipe writes it, in plain PyTorch: the reference of tests and the step
benchmark.

Captions are padded to the longest. Positive pairs, negatives, soft-masked pairs and masked captions each have their own
pass, which projects keys and values. Attention is materialized, MLM has logits at every position, the momentum queue is
concatenated, and the map comes from hooks on the attention. The map's backward pass stops at the attention: a plain
`score.backward()` would continue through both encoders and be slower.

It reads the weights of a SoftMaskPP by name and shares only its image encoder.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmask.data import Batch
from softmask.models import SoftMaskPP
from softmask.models.config import MAX_TEMPERATURE, MIN_TEMPERATURE
from softmask.models.layers.numerics import at_least_fp32
from softmask.models.softmask_pp.masking import Draws


class AttentionMap:
    """Saves one attention's probabilities [B, H, T, P] in forward and, by a hook, their gradient in backward."""

    def save(self, probabilities: Tensor) -> None:
        self.values = probabilities
        probabilities.register_hook(self._save_gradient)

    def _save_gradient(self, gradient: Tensor) -> None:
        self.gradient = gradient


def attention(
    block: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    mask: Tensor | None,
    into: AttentionMap | None,
) -> Tensor:
    """query [N, T, D], key, value [N, S, D], mask [N, S] bool -> output projection of the attention, [N, T, D]."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(dim=-1)
    if into is not None:
        into.save(probabilities)
    return block.output((probabilities @ value).transpose(1, 2).flatten(2))


def feed_forward(block: nn.Module, x: Tensor) -> Tensor:
    return block.norm(x + block.down(F.gelu(block.up(x))))


def token_logits(network: nn.Module, states: Tensor) -> Tensor:
    head = network.mlm_head
    return F.linear(head.norm(F.gelu(head.dense(states))), network.text.embeddings.word.weight, head.bias)


class PlainSoftMaskPP:
    def __init__(self, model: SoftMaskPP) -> None:
        self.model, self.config = model, model.config

    # -- networks -----------------------------------------------------------------------------------------------------

    def self_attention(self, block: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        options = {"heads": self.config.text.heads, "mask": mask, "into": None}
        return block.norm(x + attention(block, block.query(x), block.key(x), block.value(x), **options))

    def cross_attention(self, block: nn.Module, x: Tensor, image: Tensor, into: AttentionMap | None) -> Tensor:
        value = F.linear(image, block.value.weight, block.value_bias)
        options = {"heads": self.config.text.heads, "mask": None, "into": into}
        return block.norm(x + attention(block, block.query(x), block.key(image), value, **options))

    def text(self, network: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        part = network.text.embeddings
        position = torch.arange(ids.shape[1], device=ids.device)
        x = part.norm(part.word(ids) + part.position(position) + part.token_type(torch.zeros_like(ids)))
        for layer in network.text.layers:
            x = feed_forward(layer.feed_forward, self.self_attention(layer.self_attention, x, mask))
        return x

    def fuse(
        self, network: nn.Module, text: Tensor, mask: Tensor, image: Tensor, into: AttentionMap | None = None
    ) -> Tensor:
        """text [N, T, D], image [N, P, D_image] -> [N, T, D]."""
        x = text
        for number, layer in enumerate(network.fusion.layers):
            x = self.self_attention(layer.self_attention, x, mask)
            x = self.cross_attention(layer.cross_attention, x, image, into if number == self.config.cam_layer else None)
            x = feed_forward(layer.feed_forward, x)
        return x

    @staticmethod
    def feature(projection: nn.Module, tokens: Tensor) -> Tensor:
        return F.normalize(at_least_fp32(projection(tokens[:, 0])), dim=-1)

    # -- the step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update_momentum(self) -> None:
        for theirs, ours in zip(
            self.model.momentum_encoder.parameters(), self.model.backbone.parameters(), strict=True
        ):
            theirs.data = theirs.data * self.config.momentum + ours.data * (1.0 - self.config.momentum)

    def losses(self, batch: Batch, draws: Draws, *, alpha: float) -> dict[str, Tensor]:
        student, teacher = self.model.backbone, self.model.momentum_encoder
        mask = batch.attention_mask
        image = student.vision(batch.images)
        text = self.text(student, batch.input_ids, mask)
        with torch.no_grad():
            image_teacher = teacher.vision(batch.images)
            text_teacher = self.text(teacher, batch.input_ids, mask)
        losses = {"itc": self.contrastive(image, text, image_teacher, text_teacher, alpha)}

        seen = AttentionMap() if self.config.soft_mask else None
        positive = self.match(text, mask, image, seen)
        texts, images = torch.cat([text, text[draws.hard_text]]), torch.cat([image[draws.hard_image], image])
        negative = self.match(texts, torch.cat([mask, mask[draws.hard_text]]), images)
        losses["itm"] = match_loss(positive, negative)
        if seen is not None:
            soft = image * self.image_weight(positive, seen, draws.word_index)[..., None]
            texts, images = torch.cat([text, text[draws.hard_text]]), torch.cat([soft, soft])
            masked, mismatch = self.match(texts, torch.cat([mask, mask[draws.hard_text]]), images).chunk(2)
            losses["itm_soft"] = match_loss(masked, torch.cat([negative.chunk(2)[0], mismatch]))
        losses["mlm"] = self.masked_tokens(batch, draws, image, image_teacher, alpha)
        return losses

    def match(self, text: Tensor, mask: Tensor, image: Tensor, into: AttentionMap | None = None) -> Tensor:
        return self.model.itm_head(self.fuse(self.model.backbone, text, mask, image, into)[:, 0])

    def image_weight(self, positive: Tensor, seen: AttentionMap, word_index: Tensor) -> Tensor:
        """[B, P] weights of the image tokens: 1 - the normalized Grad-CAM of one word, and 1 for CLS."""
        torch.autograd.backward(at_least_fp32(positive[:, 1]).sum(), retain_graph=True, inputs=[seen.values])
        seen.values.grad = None
        with torch.no_grad():
            cam = (seen.values * seen.gradient.clamp(min=0)).mean(1)[:, :, 1:]  # [B, T, P - 1]
            rows = torch.arange(len(cam), device=cam.device)[:, None]
            given = (word_index >= 0)[..., None]
            word = (cam[rows, word_index.clamp(min=0)] * given).sum(1) / given.sum(1).clamp(min=1)
            low, high = word.amin(1, keepdim=True), word.amax(1, keepdim=True)
            return F.pad(1.0 - self.config.strength * (word - low) / (high - low + 1e-7), (1, 0), value=1.0)

    def contrastive(
        self, image: Tensor, text: Tensor, image_teacher: Tensor, text_teacher: Tensor, alpha: float
    ) -> Tensor:
        student, teacher, queues = self.model.backbone, self.model.momentum_encoder, self.model.contrast
        scale = 1.0 / self.model.temperature.clamp(MIN_TEMPERATURE, MAX_TEMPERATURE)
        image, text = self.feature(student.image_projection, image), self.feature(student.text_projection, text)
        with torch.no_grad():
            image_teacher = self.feature(teacher.image_projection, image_teacher)
            text_teacher = self.feature(teacher.text_projection, text_teacher)
            images, texts = (
                torch.cat([teacher.T, queue.clone().T.to(teacher.dtype)], dim=1)
                for teacher, queue in ((image_teacher, queues.image_queue), (text_teacher, queues.text_queue))
            )
            own = torch.zeros(len(image), images.shape[1], device=image.device, dtype=image.dtype).fill_diagonal_(1.0)
            targets = [
                alpha * (rows @ keys * scale).softmax(dim=1) + (1.0 - alpha) * own
                for rows, keys in ((image_teacher, texts), (text_teacher, images))
            ]
        total = 0.0
        for rows, keys, target in ((image, texts, targets[0]), (text, images, targets[1])):
            log_p = (rows @ keys * scale).log_softmax(dim=1)
            focal = (1.0 - log_p.exp()) ** self.config.gamma if self.config.gamma else 1.0
            total = total - (target * focal * log_p).sum(dim=1).mean() / 2
        return total

    def masked_tokens(self, batch: Batch, draws: Draws, image: Tensor, image_teacher: Tensor, alpha: float) -> Tensor:
        """The MLM loss, with logits of student and teacher at every position."""

        def logits(network: nn.Module, image_tokens: Tensor) -> Tensor:
            text = self.text(network, draws.masked.input_ids, batch.attention_mask)
            states = self.fuse(network, text, batch.attention_mask, image_tokens)
            return at_least_fp32(token_logits(network, states))

        with torch.no_grad():
            target = logits(self.model.momentum_encoder, image_teacher).softmax(dim=-1)
        scores = logits(self.model.backbone, image)
        hard = F.cross_entropy(scores.flatten(0, 1), draws.masked.labels.flatten(), ignore_index=-100)
        soft = -(scores.log_softmax(dim=-1) * target).sum(dim=-1)[draws.masked.labels != -100].mean()
        return (1.0 - alpha) * hard + alpha * soft


def match_loss(match: Tensor, mismatch: Tensor) -> Tensor:
    labels = torch.cat([torch.ones(len(match)), torch.zeros(len(mismatch))]).long().to(match.device)
    logits = torch.cat([match, mismatch])
    return F.cross_entropy(at_least_fp32(logits), labels)
