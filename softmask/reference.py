"""Every op in plain PyTorch: the definition that all backends are tested against, and the fallback.

Shapes: B captions or images, T text tokens, P image tokens (prefix tokens such as CLS first), N pairs, H heads, E head
width, D feature width, W words, S sub-word tokens of a word, K queue length, G rows of the batch over all ranks.

Everything is computed in fp32, or fp64 if an input is fp64, also under autocast. ``softmask.ops`` checks the arguments
and gathers features across ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NORMALIZE_EPS = 1e-7  # keeps a constant map at 0 (ALBEF's and AMC's value)
PATCH_VARIANCE_EPS = 1e-6  # MAE's


def word_attention(
    query: Tensor, key: Tensor, word_index: Tensor, *, value: Tensor | None = None, grad_output: Tensor | None = None,
    value_bias: Tensor | None = None, scale: float | None = None, key_padding_mask: Tensor | None = None,
    num_prefix_tokens: int = 0, normalize: str | None = None,
) -> Tensor:  # fmt: skip
    """Attention maps, or Grad-CAM maps, of chosen words.

    With ``A = softmax(scale * q k^T)`` over the keys that are not ignored, the map of word w is the mean over heads and
    over the word's sub-tokens t of ``A[t]``, or of ``A[t] * relu(dO[t] (v + value_bias)^T)`` where ``dO = grad_output``
    is the gradient at the attention output: O = A v, so dO v^T is the gradient at A, and only the words' rows are
    computed. Prefix columns are dropped, then the map is normalized.

    Shapes: query, grad_output [B, H, T, E]; key, value [B, H, P, E]; value_bias [H, E]; word_index [B, W] or [B, W, S]
    int64, -1 pads; key_padding_mask [B, P] bool, True = ignore. Returns [B, W, P - num_prefix_tokens], fp32 (fp64 for
    fp64 inputs). A word of only -1 and a row without any key give zeros.

    Source: Grad-CAM of ALBEF (arXiv 2107.07651), in the training step as in SoftMask++ (arXiv 2304.00719).
    """
    dtype = _compute_dtype(query, key, value, grad_output, value_bias)
    index = word_index if word_index.dim() == 3 else word_index.unsqueeze(-1)  # [B, W, S]
    scale, autocast = query.shape[-1] ** -0.5 if scale is None else scale, _autocasts(query)
    with _no_autocast(query):
        key = _unread(key, key_padding_mask)
        logits = _product(_rows(query, index).to(dtype), key.to(dtype).mT, autocast) * scale  # [B, H, W*S, P]
        ignore = None if key_padding_mask is None else key_padding_mask[:, None, None]
        maps = _masked_softmax(logits, ignore)[..., num_prefix_tokens:]
        if grad_output is not None and value is not None:
            value = _unread(value, key_padding_mask)
            gradient = _rows(grad_output, index).to(dtype)
            gradient_at_maps = _product(gradient, value[:, :, num_prefix_tokens:].to(dtype).mT, autocast)
            if value_bias is not None:  # dO (v + b)^T without a copy of v
                gradient_at_maps = gradient_at_maps + (gradient * value_bias.to(dtype)[:, None]).sum(-1, keepdim=True)
            maps = maps * gradient_at_maps.relu()
        maps = maps.mean(1).unflatten(1, index.shape[1:])  # [B, W, S, P]
        padding = index < 0
        maps = maps.masked_fill(padding.unsqueeze(-1), 0.0).sum(2)
        maps = maps / (~padding).sum(2, keepdim=True).clamp_min(1)
        return normalize_map(maps, normalize)


def normalize_map(maps: Tensor, normalize: str | None) -> Tensor:
    """Each map [..., P] by itself: ``minmax`` (c - min) / (max - min + 1e-7), ``max`` c / (max + 1e-7),
    ``sum`` c / (sum + 1e-7), None: as it is. Elements that tie for min or max share the gradient evenly."""
    if normalize is None:
        return maps
    if normalize == "minmax":
        low = maps.amin(-1, keepdim=True)
        return (maps - low) / (maps.amax(-1, keepdim=True) - low + NORMALIZE_EPS)
    return maps / ((maps.amax if normalize == "max" else maps.sum)(-1, keepdim=True) + NORMALIZE_EPS)


def soft_mask(
    features: Tensor,
    maps: Tensor,
    *,
    strength: float = 1.0,
    normalize: str | None = "minmax",
    num_prefix_tokens: int = 1,
) -> Tensor:
    """Text-driven soft masking: ``out = features * (1 - strength * norm(map))``, prefix tokens unchanged.

    Shapes: features [B, P, D]; maps [B, P'] -> [B, P, D], or maps [B, W, P'] -> [B, W, P, D] with
    P' = P - num_prefix_tokens. Returns the dtype of features. Gradient to features and to maps.

    Source: SoftMask++ (arXiv 2304.00719).
    """
    dtype = _compute_dtype(features, maps)
    with _no_autocast(features):
        weight = 1.0 - strength * normalize_map(maps.to(dtype), normalize)
        weight = F.pad(weight, (num_prefix_tokens, 0), value=1.0).unsqueeze(-1)
        features_by_map = features if maps.dim() == 2 else features.unsqueeze(1)
        return (features_by_map.to(dtype) * weight).to(features.dtype)


def focal_contrastive_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor | float, *, gamma: Tensor | float = 0.0,
    ids: Tensor | None = None, all_image: Tensor | None = None, all_text: Tensor | None = None,
    all_ids: Tensor | None = None, first_row: int = 0, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Symmetric InfoNCE with focal weights: the mean over rows and over both directions of
    ``-sum_j y_j (1 - p_j)^gamma log p_j`` with ``p = softmax(logit_scale * image @ text^T)``.

    y is one-hot, or with ids [B] shared evenly by all columns of the same id. all_image, all_text [G, D] and all_ids
    [G] are the columns where they are more than the rows: those of all ranks, the local rows starting at first_row.
    Shapes: image, text [B, D], L2-normalized; logit_scale, gamma float or 0-dim. Returns a scalar for reduction "mean"
    and "sum", for "none" [B]: the mean of both directions. An empty batch gives 0. gamma = 0 is exactly cross-entropy.

    Source: CLIP (arXiv 2103.00020) with focal factors (Lin et al., arXiv 1708.02002) as in SoftMask++.
    """
    dtype, autocast = _compute_dtype(image, text), _autocasts(image)
    with _no_autocast(image):
        image, text = image.to(dtype), text.to(dtype)
        all_image = image if all_image is None else all_image.to(dtype)
        all_text = text if all_text is None else all_text.to(dtype)
        key_ids = ids if all_ids is None else all_ids
        target = _positive_share(len(image), len(all_text), first_row, ids, key_ids, like=image)
        sides = ((image, all_text), (text, all_image))
        logits = (logit_scale * _product(rows, columns.T, autocast) for rows, columns in sides)
        of_image, of_text = (_focal_cross_entropy(side, target, gamma) for side in logits)
        return reduce(0.5 * (of_image + of_text), reduction)


def momentum_contrastive_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor | float, *, image_teacher: Tensor, text_teacher: Tensor,
    image_queue: Tensor | None = None, text_queue: Tensor | None = None, alpha: Tensor | float = 0.4,
    gamma: Tensor | float = 0.0, ids: Tensor | None = None, queue_ids: Tensor | None = None,
    all_image_teacher: Tensor | None = None, all_text_teacher: Tensor | None = None, all_ids: Tensor | None = None,
    first_row: int = 0, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """ALBEF's momentum-distilled contrastive loss: the mean over rows and both directions of
    ``-sum_j y_j (1 - p_j)^gamma log p_j``, ``y = alpha * softmax(teacher logits) + (1 - alpha) * positives``.

    Image rows meet text keys and the reverse. Keys are the teacher features of the batch (all_..._teacher [G, D]: of
    all ranks, the local rows starting at first_row) followed by the queue [K, D] of any strides. Student and teacher
    share keys and logit_scale; gradient goes to image, text and logit_scale through the student's logits only.
    ids [B] (all_ids [G]) and queue_ids [K]: keys of the row's id share the positive mass; without queue_ids no queue
    row is a positive. Other shapes and reduction as in `focal_contrastive_loss`.

    Source: ALBEF (arXiv 2107.07651), its public code; focal factor as in SoftMask++.
    """
    dtype, autocast = _compute_dtype(image, text, image_teacher, text_teacher), _autocasts(image)
    with _no_autocast(image):
        image_teacher, text_teacher = image_teacher.detach().to(dtype), text_teacher.detach().to(dtype)
        all_image = image_teacher if all_image_teacher is None else all_image_teacher
        all_text = text_teacher if all_text_teacher is None else all_text_teacher
        key_ids = ids if all_ids is None else all_ids
        if key_ids is not None and queue_ids is not None:
            key_ids = torch.cat([key_ids, queue_ids])
        columns = len(all_text) + (0 if text_queue is None else len(text_queue))
        positives = _positive_share(len(image), columns, first_row, ids, key_ids, like=image_teacher)

        def side(query: Tensor, teacher: Tensor, batch: Tensor, queue: Tensor | None) -> Tensor:  # [B]
            # Kept apart, because joining them would copy the queue.
            keys = [one.detach().to(dtype) for one in (batch, queue) if one is not None]
            fixed_scale = logit_scale.detach() if isinstance(logit_scale, Tensor) else logit_scale
            soft = (fixed_scale * torch.cat([teacher @ part.T for part in keys], -1)).softmax(-1)
            logits = logit_scale * torch.cat([_product(query, part.T, autocast) for part in keys], -1)
            return _focal_cross_entropy(logits, alpha * soft + (1.0 - alpha) * positives, gamma)

        of_image = side(image.to(dtype), image_teacher, all_text, text_queue)
        loss = 0.5 * (of_image + side(text.to(dtype), text_teacher, all_image, image_queue))
        return reduce(loss, reduction)


def soft_mask_attention(
    query: Tensor, key: Tensor, value: Tensor, *, key_weight: Tensor | None = None, kv_index: Tensor | None = None,
    value_bias: Tensor | None = None, key_padding_mask: Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Cross-attention to soft-masked image tokens whose keys and values were projected once, from the unmasked tokens.

    Masking commutes with a bias-free projection, (m * V) W = m * (V W), so with m = key_weight
    ``a = softmax_p(m_p (q . k_p) scale)``, ``out = sum_p a_p m_p v_p + (sum_p a_p) value_bias``. The key projection's
    bias adds a constant per row and drops out of the softmax.

    Shapes: query [N, H, T, E]; key, value [B, H, P, E]; kv_index [N] int64, the image of each pair (None: N = B);
    key_weight [N, P], 1 = keep, 0 = masked, a constant; value_bias [H, E]; key_padding_mask [B, P] bool, True = ignore.
    Returns [N, H, T, E] in the dtype of query; a row whose keys are all ignored gives zeros.

    Source: SoftMask++ (arXiv 2304.00719), rewritten; attention: Vaswani et al., arXiv 1706.03762.
    """
    dtype, autocast = _compute_dtype(query, key, value), _autocasts(query)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with _no_autocast(query):
        key, value = (_unread(one, key_padding_mask).to(dtype) for one in (key, value))
        if kv_index is not None:
            key, value = (one.index_select(0, kv_index) for one in (key, value))
        ignore = key_padding_mask
        if ignore is not None:
            ignore = (ignore if kv_index is None else ignore.index_select(0, kv_index))[:, None, None]  # [N, 1, 1, P]
        if key_weight is not None:
            weight = key_weight.detach().to(dtype)[:, None, None]
            weight = (weight if ignore is None else weight.masked_fill(ignore, 0.0)).mT
            key, value = key * weight, value * weight
        output = _attention(query.to(dtype), key, value, ignore, scale, autocast)
        if value_bias is not None:
            output = output + value_bias.to(dtype)[:, None]
        output = output if ignore is None else output.masked_fill(ignore.all(-1, keepdim=True), 0.0)
        return output.to(query.dtype)


def attentive_mask(
    patches: Tensor, tokens: Tensor, *, ratio: float, select: str = "high", token_padding_mask: Tensor | None = None
) -> Tensor:
    """The round(ratio * P) patches of each image that are most ("high") or least ("low") relevant to the caption.

    ``relevance_p = max_t cos(patch_p, token_t)`` over the tokens that are not padding; ties go to the lower position,
    also where every token is padding. round is Python's (half to even). No gradient.

    Shapes: patches [B, P, D]; tokens [B, T, D]; token_padding_mask [B, T] bool, True = ignore. Returns bool [B, P],
    True = selected.

    Source: SyCoCa (Ma et al., ICML 2024, arXiv 2401.02137).
    """
    dtype = _compute_dtype(patches, tokens)
    with _no_autocast(patches), torch.no_grad():
        similarity = _products(F.normalize(patches.to(dtype), dim=-1), F.normalize(tokens.to(dtype), dim=-1))
        if token_padding_mask is not None:
            similarity = similarity.masked_fill(token_padding_mask[:, None], float("-inf"))
        order = similarity.amax(-1).argsort(dim=-1, descending=select == "high", stable=True)
        selected = torch.zeros_like(order, dtype=torch.bool)
        return selected.scatter_(-1, order[:, : round(ratio * order.shape[-1])], True)


def masked_patch_loss(
    prediction: Tensor,
    images: Tensor,
    mask: Tensor,
    *,
    patch_size: int,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """MAE's reconstruction loss: mean squared error on the pixels of the masked patches, mean over masked patches.

    With normalize every patch's pixels x become ``(x - mean) / sqrt(var + 1e-6)``, var unbiased. Images are targets:
    gradient to prediction only. No masked patch gives 0 with zero gradient.

    Shapes: prediction [B, P, 3 * patch_size**2], pixels ordered rows, columns, channels; images [B, 3, Hpx, Wpx],
    patches row by row; mask [B, P] bool. Returns a scalar for "mean" and "sum", for "none" [B, P]: 0 where not masked.

    Source: He et al., arXiv 2111.06377, its public code.
    """
    dtype = _compute_dtype(prediction, images)
    rows, columns = images.shape[-2] // patch_size, images.shape[-1] // patch_size
    with _no_autocast(prediction):
        pixels = images.detach().to(dtype).unflatten(3, (columns, patch_size)).unflatten(2, (rows, patch_size))
        pixels = pixels.permute(0, 2, 4, 3, 5, 1)  # a view [B, rows, columns, patch row, patch column, channel]
        if normalize:
            variance, mean = torch.var_mean(pixels, dim=(3, 4, 5), keepdim=True)
            pixels = (pixels - mean) / (variance + PATCH_VARIANCE_EPS).sqrt()
        difference = prediction.to(dtype).reshape(pixels.shape) - pixels
        unmasked = ~mask.unflatten(1, (rows, columns))[..., None, None, None]
        loss = difference.masked_fill(unmasked, 0.0).square().mean((3, 4, 5)).flatten(1)
        return reduce(loss, reduction, count=mask.sum())


def _compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(one is not None and one.dtype == torch.float64 for one in tensors) else torch.float32


def _no_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type.replace("meta", "cpu"), enabled=False)  # "meta" has none of its own


class _Fp32Product(torch.autograd.Function):
    """a @ b with a gradient outside autocast, which is active if `backward` is called, or was traced, under it."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        with _no_autocast(grad):
            return grad @ ctx.saved_tensors[1].mT, ctx.saved_tensors[0].mT @ grad


class _TransformedFp32Product(_Fp32Product):
    """With the rules of torch.func's transforms, of which torch.compile takes none."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, a_tangent: Tensor, b_tangent: Tensor) -> Tensor:
        return a_tangent @ ctx.saved_tensors[1] + ctx.saved_tensors[0] @ b_tangent


def _autocasts(tensor: Tensor) -> bool:
    """Whether the caller is under autocast: to be asked before it is switched off."""
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def _product(a: Tensor, b: Tensor, autocast: bool) -> Tensor:
    kind = _Fp32Product if torch.compiler.is_compiling() else _TransformedFp32Product
    return kind.apply(a, b) if autocast else a @ b


def _attention(
    query: Tensor, key: Tensor, value: Tensor, ignore: Tensor | None, scale: float, autocast: bool
) -> Tensor:
    """Any finite values in a row without keys. Autocast reaches products in the gradient of PyTorch's attention."""
    if autocast and torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value)):
        return _product(_masked_softmax(_product(query, key.mT, True) * scale, ignore), value, True)
    # No row of SDPA is ever empty: what it gives there differs by its backend.
    keep = None if ignore is None else ~ignore | ignore.all(-1, keepdim=True)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=keep, scale=scale)


def _unread(tensor: Tensor, ignore: Tensor | None) -> Tensor:
    """[B, H, P, E] with zeros at ignored keys [B, P]: a NaN there would come through a probability of 0."""
    return tensor if ignore is None else tensor.masked_fill(ignore[:, None, :, None], 0.0)


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Rows of [B, H, T, E] at index [B, W, S] -> [B, H, W*S, E]; zeros at a padding -1."""
    flat = index.flatten(1)[:, None, :, None]
    rows = tensor.gather(2, flat.clamp_min(0).expand(-1, tensor.shape[1], -1, tensor.shape[3]))
    return rows.masked_fill(flat < 0, 0.0)


def _products(patches: Tensor, tokens: Tensor) -> Tensor:
    """[B, P, D], [B, T, D] -> [B, P, T], the same of equal patches: a matrix product rounds a row by its place."""
    patches = patches.contiguous()
    if torch.compiler.is_compiling():  # which fuses this, and would compile the loop again for every T
        return (patches[:, :, None] * tokens[:, None]).sum(-1)
    return torch.stack([(patches * token[:, None]).sum(-1) for token in tokens.unbind(1)], dim=-1)


def _masked_softmax(logits: Tensor, ignore: Tensor | None) -> Tensor:
    """Softmax over the keys that are not ignored. A finite fill keeps rows without keys free of NaN, both ways."""
    if ignore is None:
        return logits.softmax(-1)
    return logits.masked_fill(ignore, torch.finfo(logits.dtype).min).softmax(-1).masked_fill(ignore, 0.0)


def _positive_share(
    rows: int, columns: int, first_row: int, ids: Tensor | None, key_ids: Tensor | None, *, like: Tensor
) -> Tensor:
    """Target mass [rows, columns]: evenly on the row's positives, the keys of its id (keys beyond key_ids are none)."""
    if ids is None or key_ids is None:
        row = torch.arange(rows, device=like.device)
        return (row[:, None] + first_row == torch.arange(columns, device=like.device)).to(like.dtype)
    same = F.pad(ids[:, None].eq(key_ids).to(like.dtype), (0, columns - len(key_ids)))
    return same / same.sum(-1, keepdim=True)


def _focal_cross_entropy(logits: Tensor, target: Tensor, gamma: Tensor | float) -> Tensor:
    """-sum_j y_j (1 - p_j)^gamma log p_j per row. 1 - p from expm1 is exact near p = 1; the clamp keeps its power
    differentiable at p = 1 for gamma in (0, 1), and exactly 1 for gamma = 0."""
    log_p = logits.log_softmax(-1)
    miss = (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny)
    return -(target * miss**gamma * log_p).sum(-1)


def reduce(loss: Tensor, reduction: str, *, count: Tensor | None = None) -> Tensor:
    """loss by "none", "sum" or "mean", over its rows or over the 0-dim count; the mean of nothing is 0."""
    if reduction == "none":
        return loss
    if reduction == "mean" and count is None and len(loss):
        return loss.mean()
    total = loss.sum()
    return total if reduction == "sum" or count is None else total / count.clamp_min(1)
