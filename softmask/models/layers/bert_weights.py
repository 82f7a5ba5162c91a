"""Hugging Face BERT checkpoints, such as bert-base-uncased, into the text encoder, fusion encoder and MLM head.

As in ALBEF, layers 0 .. text_layers - 1 become the text encoder and the next ones the fusion encoder. BERT has no
cross-attention, which keeps its random initialization.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softmask.models.layers.weight_files import read_tensors

EMBEDDINGS = {
    "embeddings.word_embeddings.weight": "text.embeddings.word.weight",
    "embeddings.position_embeddings.weight": "text.embeddings.position.weight",
    "embeddings.token_type_embeddings.weight": "text.embeddings.token_type.weight",
    "embeddings.LayerNorm.weight": "text.embeddings.norm.weight",
    "embeddings.LayerNorm.bias": "text.embeddings.norm.bias",
}
LAYER = {
    "attention.self.query": "self_attention.query",
    "attention.self.key": "self_attention.key",
    "attention.self.value": "self_attention.value",
    "attention.output.dense": "self_attention.output",
    "attention.output.LayerNorm": "self_attention.norm",
    "intermediate.dense": "feed_forward.up",
    "output.dense": "feed_forward.down",
    "output.LayerNorm": "feed_forward.norm",
}
MLM_HEAD = {
    "cls.predictions.transform.dense.weight": "mlm_head.dense.weight",
    "cls.predictions.transform.dense.bias": "mlm_head.dense.bias",
    "cls.predictions.transform.LayerNorm.weight": "mlm_head.norm.weight",
    "cls.predictions.transform.LayerNorm.bias": "mlm_head.norm.bias",
    "cls.predictions.bias": "mlm_head.bias",
}


def read_state(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of a Hugging Face checkpoint folder: model.safetensors or pytorch_model.bin."""
    folder = Path(folder)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_tensors(folder / name, "text.checkpoint")
    raise FileNotFoundError(
        f"text.checkpoint: expected model.safetensors or pytorch_model.bin in {folder}, found neither"
    )


def convert(state: dict[str, Tensor], *, text_layers: int, fusion_layers: int) -> dict[str, Tensor]:
    """Hugging Face names -> ours, with or without a `bert.` prefix; LayerNorms may have old `gamma` and `beta`."""
    state = {_modern(name): tensor for name, tensor in state.items()}
    names = dict(EMBEDDINGS)
    for number in range(text_layers + fusion_layers):
        ours = f"text.layers.{number}" if number < text_layers else f"fusion.layers.{number - text_layers}"
        for theirs, part in LAYER.items():
            for kind in ("weight", "bias"):
                names[f"encoder.layer.{number}.{theirs}.{kind}"] = f"{ours}.{part}.{kind}"
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(
            f"text.checkpoint: expected {len(names)} tensors of a BERT with at least {text_layers + fusion_layers} "
            f"layers, {len(missing)} are missing, the first: {missing[0]}"
        )
    names |= {name: ours for name, ours in MLM_HEAD.items() if name in state}
    return {ours: state[name] for name, ours in names.items()}


def _modern(name: str) -> str:
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def load_bert(backbone: Any, folder: str | Path) -> str:
    """Copy a Hugging Face BERT into `backbone` (its .text, .fusion and .mlm_head); sizes must match.

    Returns how many tensors were filled and how many stay random, in words.
    """
    text_layers, fusion_layers = len(backbone.text.layers), len(backbone.fusion.layers)
    ours = convert(read_state(folder), text_layers=text_layers, fusion_layers=fusion_layers)
    expected = dict(backbone.named_parameters())
    for name, tensor in ours.items():
        if expected[name].shape != tensor.shape:
            raise ValueError(
                f"text.checkpoint: expected {name} of shape {tuple(expected[name].shape)}, got {tuple(tensor.shape)}"
            )
        with torch.no_grad():
            expected[name].copy_(tensor)
    parts = [(name, part) for name, part in backbone.named_parameters() if name.startswith(("text.", "fusion.", "mlm"))]
    rest = [name for name, _ in parts if name not in ours]
    return f"{len(ours)} tensors of {folder}" + (f", {len(rest)} random ({rest[0]} ...)" if rest else "")
