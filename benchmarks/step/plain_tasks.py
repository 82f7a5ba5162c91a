"""Tasks after pre-training as ALBEF's recipes compute them, in plain PyTorch: the reference of tests and benchmarks.

Texts are padded to the longest. Every pair of a picture and a caption, and every pair of a question and an answer, has
its own copy of keys and values; NLVR2's two pictures have their own passes through the projections.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.step.plain_softmask_pp import AttentionMap, PlainSoftMaskPP, attention, feed_forward
from softmask.models.layers.numerics import at_least_fp32


class PlainTasks(PlainSoftMaskPP):
    """Reads the weights of a SoftMaskPP, a Classifier or a Vqa by name and shares only its image encoder."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)

    def match_all(self, images: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Matching logits [I, C] of all images' tokens [I, P, D] with all texts [C, T, D], image by image."""
        rows = [self.match(text, mask, image[None].expand(len(text), -1, -1))[:, 1] for image in images]
        return torch.stack(rows)

    def classify(
        self,
        images: Tensor,
        ids: Tensor,
        mask: Tensor,
        *,
        network: Any = None,
        into: dict[int, AttentionMap] | None = None,
    ) -> Tensor:
        """Logits of the fused CLS; images [n B, ...], the n pictures of the first text, then those of the second.
        `into`: number of a layer -> what saves its attention."""
        network = self.model.backbone if network is None else network
        tokens = network.vision(images)
        pictures = [tokens[number :: network.fusion.copies] for number in range(network.fusion.copies)]
        x, layers = self.text(network, ids, mask), list(network.fusion.layers)
        for number, layer in enumerate(layers):
            turn = number % len(pictures)
            x = self.self_attention(layer.self_attention, x, mask)
            saved = (into or {}).get(number)
            x = self.read(layer.cross_attention, layers[number - turn].cross_attention, x, pictures[turn], None, saved)
            x = feed_forward(layer.feed_forward, x)
        return network.head(x[:, 0])

    def read(
        self,
        block: nn.Module,
        projecting: nn.Module,
        x: Tensor,
        source: Tensor,
        mask: Tensor | None,
        into: AttentionMap | None = None,
    ) -> Tensor:
        """Cross-attention of x [N, T, D] to source [N, S, D'] with the keys and values of the layer `projecting`."""
        value = F.linear(source, projecting.value.weight, block.value_bias)
        options = {"heads": self.config.text.heads, "mask": mask, "into": into}
        return block.norm(x + attention(block, block.query(x), projecting.key(source), value, **options))

    def question(
        self, network: nn.Module, images: Tensor, ids: Tensor, mask: Tensor, into: AttentionMap | None = None
    ) -> Tensor:
        return self.fuse(network, self.text(network, ids, mask), mask, network.vision(images), into)

    def answer_logits(
        self, network: nn.Module, answers: Tensor, answer_mask: Tensor, states: Tensor, mask: Tensor
    ) -> Tensor:
        """Logits [A, T, V] of the token after each token of answers [A, T], each with a question's states [A, S, D]."""
        decoder = network.decoder
        part, position = decoder.embeddings, torch.arange(answers.shape[1], device=answers.device)
        x = part.norm(part.word(answers) + part.position(position) + part.token_type(torch.zeros_like(answers)))
        past = torch.ones(len(position), len(position), dtype=torch.bool, device=answers.device).tril()
        for layer in decoder.fusion.layers:
            x = self.causal(layer.self_attention, x, past & answer_mask[:, None])
            x = self.read(layer.cross_attention, layer.cross_attention, x, states, mask)
            x = feed_forward(layer.feed_forward, x)
        head = decoder.head
        return F.linear(head.norm(F.gelu(head.dense(x))), part.word.weight, head.bias)

    def causal(self, block: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        """Self-attention with mask [N, T, T]."""
        query, key, value = (
            layer(x).unflatten(-1, (self.config.text.heads, -1)).transpose(1, 2)
            for layer in (block.query, block.key, block.value)
        )
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
        return block.norm(x + block.output((scores.softmax(-1) @ value).transpose(1, 2).flatten(2)))

    def answer_loss(self, batch: Any, *, alpha: float) -> Tensor:
        """Every answer's weight times its cross-entropy, distilled, over the number of questions."""
        answers, mask = batch.answer_ids, batch.answer_mask

        def logits(network: nn.Module) -> Tensor:
            states = self.question(network, batch.images, batch.input_ids, batch.attention_mask)[batch.question]
            return at_least_fp32(
                self.answer_logits(network, answers, mask, states, batch.attention_mask[batch.question])
            )[:, :-1]

        log_p, labels = logits(self.model.backbone).log_softmax(-1), answers[:, 1:]
        with torch.no_grad():
            target = logits(self.model.momentum_encoder).softmax(-1)
        hard = -log_p.gather(2, labels[..., None])[..., 0]
        soft = -(target * log_p).sum(-1)
        of_answer = (((1 - alpha) * hard + alpha * soft) * mask[:, 1:]).sum(1)
        return (of_answer * batch.answer_weight).sum() / len(batch.images)

    @torch.no_grad()
    def rank_answers(self, states: Tensor, mask: Tensor, answers: Tensor, answer_mask: Tensor, *, k: int) -> Tensor:
        """Log-probabilities [B, M] of the k answers of [M, T] with the most probable first tokens after the questions'
        states [B, S, D]; -inf for others."""
        network = self.model.backbone
        start = answers[:1, :1].expand(len(states), 1)
        first = self.answer_logits(network, start, torch.ones_like(start, dtype=torch.bool), states, mask)[:, 0]
        chosen = first.softmax(-1)[:, answers[:, 1]].topk(k, dim=1).indices
        scores = torch.full((len(states), len(answers)), -torch.inf)
        tiled, tiled_mask = (x.repeat_interleave(k, dim=0) for x in (states, mask))
        rows = chosen.flatten()
        logits = self.answer_logits(network, answers[rows], answer_mask[rows], tiled, tiled_mask)[:, :-1]
        log_p = at_least_fp32(logits).log_softmax(-1).gather(2, answers[rows][:, 1:, None])[..., 0]
        return scores.scatter(1, chosen, (log_p * answer_mask[rows][:, 1:]).sum(1).view_as(chosen).float())
