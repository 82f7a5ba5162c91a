"""ALBEF written straight from the facts of its method (arXiv 2107.07651 and its public code), for the tests: separate
passes, no key bias because the softmax does not see it, image tokens gathered per pair, attention materialized, queue
concatenated.

It reads the weights of a SoftMaskPP by name and shares no code with it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class PlainALBEF:
    def __init__(self, model: torch.nn.Module) -> None:
        self.weights = dict(model.named_parameters()) | dict(model.named_buffers())
        self.model = model
        self.heads = model.config.text.heads
        self.eps = model.config.text.layer_norm_eps

    # -- BERT -------------------------------------------------------------------------------------------------------

    def linear(self, name: str, x: Tensor) -> Tensor:
        out = x @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias", self.weights.get(f"{name}_bias"))
        return out if bias is None else out + bias

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (var + self.eps).sqrt() * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def attention(self, name: str, x: Tensor, source: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """-> (block output, probabilities [N, H, T, S])."""
        head = lambda t: t.reshape(*t.shape[:2], self.heads, -1).permute(0, 2, 1, 3)  # noqa: E731
        query, key, value = (
            head(self.linear(f"{name}.{part}", states))
            for part, states in (("query", x), ("key", source), ("value", source))
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, None, :], -torch.inf)
        probabilities = scores.softmax(-1)
        if probabilities.requires_grad:
            probabilities.retain_grad()
        mixed = (probabilities @ value).permute(0, 2, 1, 3).flatten(2)
        return self.norm(f"{name}.norm", x + self.linear(f"{name}.output", mixed)), probabilities

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        hidden = self.linear(f"{name}.up", x)
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        return self.norm(f"{name}.norm", x + self.linear(f"{name}.down", hidden))

    def text(self, who: str, input_ids: Tensor, mask: Tensor) -> Tensor:
        x = self.weights[f"{who}.text.embeddings.word.weight"][input_ids]
        x = x + self.weights[f"{who}.text.embeddings.position.weight"][: input_ids.shape[1]]
        x = self.norm(f"{who}.text.embeddings.norm", x + self.weights[f"{who}.text.embeddings.token_type.weight"][0])
        for layer in range(self.model.config.text.text_layers):
            x, _ = self.attention(f"{who}.text.layers.{layer}.self_attention", x, x, ~mask)
            x = self.feed_forward(f"{who}.text.layers.{layer}.feed_forward", x)
        return x

    def fuse(self, who: str, text: Tensor, mask: Tensor, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """-> (states, cross-attention probabilities of every layer)."""
        maps = []
        for layer in range(self.model.config.text.fusion_layers):
            name = f"{who}.fusion.layers.{layer}"
            text, _ = self.attention(f"{name}.self_attention", text, text, ~mask)
            text, probabilities = self.attention(f"{name}.cross_attention", text, image, None)
            text = self.feed_forward(f"{name}.feed_forward", text)
            maps.append(probabilities)
        return text, maps

    def token_logits(self, who: str, states: Tensor) -> Tensor:
        hidden = self.linear(f"{who}.mlm_head.dense", states)
        hidden = self.norm(f"{who}.mlm_head.norm", hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))
        return hidden @ self.weights[f"{who}.text.embeddings.word.weight"].T + self.weights[f"{who}.mlm_head.bias"]

    def feature(self, who: str, kind: str, tokens: Tensor) -> Tensor:
        projected = self.linear(f"{who}.{kind}_projection", tokens[:, 0])
        return projected / projected.norm(dim=-1, keepdim=True)

    # -- the three losses -------------------------------------------------------------------------------------------

    def losses(self, batch, *, labels, masked_ids, hard_text, hard_image, alpha: float) -> dict[str, Tensor]:
        mask = batch.attention_mask
        image = self.model.backbone.vision(batch.images)
        text = self.text("backbone", batch.input_ids, mask)
        with torch.no_grad():
            image_m = self.model.momentum_encoder.vision(batch.images)
            text_m = self.text("momentum_encoder", batch.input_ids, mask)
        size = len(image)
        itc = self.itc(image, text, image_m, text_m, alpha)

        states = [self.fuse("backbone", text, mask, image)[0]]
        states.append(self.fuse("backbone", text, mask, image[hard_image])[0])
        states.append(self.fuse("backbone", text[hard_text], mask[hard_text], image)[0])
        logits = torch.cat([self.linear("itm_head", s[:, 0]) for s in states])
        target = torch.tensor([1] * size + [0] * 2 * size)
        itm = -logits.log_softmax(-1)[torch.arange(3 * size), target].mean()

        logits = self.token_logits(
            "backbone", self.fuse("backbone", self.text("backbone", masked_ids, mask), mask, image)[0]
        )
        with torch.no_grad():
            teacher = self.token_logits(
                "momentum_encoder",
                self.fuse("momentum_encoder", self.text("momentum_encoder", masked_ids, mask), mask, image_m)[0],
            )
        log_p = logits.log_softmax(-1)
        rows = labels != -100
        hard = -log_p.gather(-1, labels.clamp_min(0)[..., None])[..., 0][rows].mean()
        soft = -(teacher.softmax(-1) * log_p).sum(-1)[rows].mean()
        return {"itc": itc, "itm": itm, "mlm": (1 - alpha) * hard + alpha * soft}

    def itc(self, image: Tensor, text: Tensor, image_m: Tensor, text_m: Tensor, alpha: float) -> Tensor:
        temperature = self.weights["temperature"].clamp(0.001, 0.5)
        image, text = self.feature("backbone", "image", image), self.feature("backbone", "text", text)
        with torch.no_grad():
            image_m, text_m = (
                self.feature("momentum_encoder", "image", image_m),
                self.feature("momentum_encoder", "text", text_m),
            )
            image_all = torch.cat([image_m.T, self.weights["contrast.image_queue"].T.clone()], dim=1)
            text_all = torch.cat([text_m.T, self.weights["contrast.text_queue"].T.clone()], dim=1)
            onehot = torch.zeros(len(image), image_all.shape[1], dtype=image.dtype)
            onehot.fill_diagonal_(1)
            target_i2t = alpha * (image_m @ text_all / temperature).softmax(1) + (1 - alpha) * onehot
            target_t2i = alpha * (text_m @ image_all / temperature).softmax(1) + (1 - alpha) * onehot
        i2t = -((image @ text_all / temperature).log_softmax(1) * target_i2t).sum(1).mean()
        t2i = -((text @ image_all / temperature).log_softmax(1) * target_t2i).sum(1).mean()
        return (i2t + t2i) / 2
