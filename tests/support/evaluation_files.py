"""Images of two coloured boxes with captions and masks, an oracle that knows them, and the files of a tiny run."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from softmask.data import DataConfig, TokenBatch, open_source, rle, train_wordpiece
from softmask.models import ConvViTConfig, SoftMaskPPConfig, TextConfig, VisionConfig
from softmask.training.checkpoint.reshard import MODEL_FILE
from softmask.training.checkpoint.store import build_model
from softmask.training.config import Config, TrainConfig, save_config
from tests.support.data_files import write_tar

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}
PAIRS = list(permutations(COLOURS, 2))  # 12 scenes: the left box and the right one
ALL = tuple(range(len(PAIRS)))
SIDE = 32
LEFT, RIGHT = (slice(8, 24), slice(0, 8)), (slice(8, 24), slice(24, 32))  # rows and columns of the boxes


def scene(number: int, *, broken: bool = False, caption: str = "") -> list[tuple[str, bytes]]:
    """Members of scene `number`: an image with two boxes, its caption and the boxes' masks."""
    left, right = PAIRS[number]
    pixels = np.full((SIDE, SIDE, 3), 255, np.uint8)
    pixels[LEFT], pixels[RIGHT] = COLOURS[left], COLOURS[right]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    text = caption or f"a {left} box beside a {right} one"
    objects = []
    for colour, place in ((left, LEFT), (right, RIGHT)):
        mask = np.zeros((SIDE, SIDE), bool)
        mask[place] = True
        phrase, start = f"{colour} {'box' if place is LEFT else 'one'}", text.index(colour)
        objects.append({"phrase": phrase, "span": [start, start + len(phrase)], "mask": rle.encode(mask)})
    meta = json.dumps({"caption": text, "objects": objects}).encode()
    image = b"no image" if broken else file.getvalue()
    return [(f"{number:04d}.png", image), (f"{number:04d}.txt", text.encode()), (f"{number:04d}.json", meta)]


def write_scenes(path: Path, numbers: Iterable[int] = ALL, *, broken: tuple[int, ...] = ()) -> str:
    write_tar(path, [member for number in numbers for member in scene(number, broken=number in broken)])
    return str(path)


def write_plain(path: Path, captions: list[str]) -> str:
    """Write scenes with the given captions and no objects."""
    members = []
    for number, caption in enumerate(captions):
        members += [scene(number)[0], (f"{number:04d}.txt", caption.encode())]
    write_tar(path, members)
    return str(path)


def small_config(output: Path) -> Config:
    model = SoftMaskPPConfig(
        vision=VisionConfig(
            name="conv_vit",
            image_size=SIDE,
            conv_vit=ConvViTConfig(patch_size=8, width=24, depth=1, heads=2, stem_width=4),
        ),
        text=TextConfig(
            width=24, heads=2, intermediate_size=48, text_layers=1, fusion_layers=2, max_positions=32, dropout=0.0
        ),
        embed_dim=8,
        queue_size=16,
        cam_layer=0,
    )
    data = DataConfig(train="train.tar", image_size=SIDE, max_length=16)
    return Config(output=str(output), train=TrainConfig(steps=5, batch_size=4), model=model, data=data)


def write_run(folder: Path, data: str) -> Path:
    """A run's folder with one checkpoint of random weights, as the trainer leaves it."""
    run = folder / "run"
    checkpoint = run / "checkpoints" / "step_00000005"
    checkpoint.mkdir(parents=True)
    config = small_config(run)
    tokenizer = train_wordpiece(open_source(data).captions(), checkpoint / "tokenizer", vocab_size=64)
    save_config(config, checkpoint / "config.yaml")
    torch.manual_seed(0)
    torch.save({"module": build_model(config, tokenizer).state_dict()}, checkpoint / MODEL_FILE)
    state = {"step": 5, "seconds": 2.5, "micro_batches": 5, "skipped_samples": 0, "nonfinite": 0, "world_size": 1}
    (checkpoint / "trainer.json").write_text(json.dumps(state), encoding="utf-8")
    rows = [{"step": s, "loss": 9 / s, "itc": 5 / s, "lr": 1e-3, "samples_per_second": 10.0} for s in range(1, 6)]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return run


class Words:
    """A tokenizer with one token per word of a fixed vocabulary, between [CLS] and [SEP]."""

    vocabulary = ("[PAD]", "[CLS]", "[SEP]", "a", "box", "beside", "one", *COLOURS)

    def __call__(self, captions, *, max_length: int, append_sep: bool = True, clean: bool = False) -> TokenBatch:
        rows = []
        for caption in captions:
            position, row = 0, [(1, 0, 0, -1)]
            for number, word in enumerate(caption.split()[: max_length - 2]):
                start = caption.index(word, position)
                position = start + len(word)
                row.append((self.vocabulary.index(word), start, position, number))
            rows.append([*row, (2, 0, 0, -1)])
        width = max(map(len, rows))
        table = torch.tensor([row + [(0, 0, 0, -1)] * (width - len(row)) for row in rows])
        cut = torch.tensor([len(caption.split()) > max_length - 2 for caption in captions])
        return TokenBatch(table[..., 0], table[..., 0] > 0, table[..., 3], table[..., 1:3], cut)

    def unknown(self, captions) -> float:
        words = [word for caption in captions for word in caption.split()]
        return sum(word not in self.vocabulary for word in words) / len(words)


class Oracle:
    """A model that is always right.

    Features and first tokens are one-hot codes of the two colours; `blind` features are all equal, so that ITC must
    fail and only ITM can rank. An image's other tokens are its patches' colours. Grad-CAM is 1 on the patches of the
    word's colour, the attention everywhere else.
    """

    patch_grid = (4, 4)

    def __init__(self, config: Config, *, blind: bool = False):
        self.mean = torch.tensor(config.data.mean).view(3, 1, 1)
        self.std = torch.tensor(config.data.std).view(3, 1, 1)
        self.blind = blind
        self.images_seen = 0  # by word_maps
        self.encoded = self.projected = 0  # images
        self.passes: list[int] = []  # pairs of each call of match
        self.mapped: list[int] = []  # captions of each call of word_maps

    def _code(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        code = F.one_hot(4 * left + right, 16).float()
        return code[:, None], torch.ones_like(code) / 4 if self.blind else code

    def encode_image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.encoded += len(images)
        palette = torch.tensor(list(COLOURS.values())).float() / 255
        pixels = (images * self.std + self.mean).movedim(1, -1)  # [B, H, W, 3]
        left, right = (torch.cdist(pixels[:, 16, column], palette).argmin(1) for column in (4, 28))
        code, feature = self._code(left, right)
        return torch.cat([code, F.pad(self._patches(images), (0, 13))], 1), feature

    def _patches(self, images: Tensor) -> Tensor:
        """[B, 16, 3]: the mean colour of every patch."""
        return F.avg_pool2d(images * self.std + self.mean, 8).flatten(2).movedim(1, -1)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        first = Words.vocabulary.index("red")
        colours = torch.stack([row[row >= first] - first for row in input_ids])
        return self._code(colours[:, 0], colours[:, 1])

    def image_keys(self, image_tokens: Tensor) -> Tensor:
        self.projected += len(image_tokens)
        return image_tokens[:, 0]

    def match(self, keys: Tensor, text_tokens: Tensor, attention_mask: Tensor, *, kv_index: Tensor) -> Tensor:
        self.passes.append(len(text_tokens))
        same = (keys[kv_index] * text_tokens[:, 0]).sum(1)
        return torch.stack([-same, 2 * same], dim=1)

    def word_maps(self, images, input_ids, attention_mask, word_index, *, kind, normalize, kv_index=None):
        self.images_seen += len(images)
        self.mapped.append(len(input_ids))
        patches = self._patches(images) if images.ndim == 4 else images[:, 1:, :3]
        patches = patches if kv_index is None else patches[kv_index]
        first, palette = Words.vocabulary.index("red"), torch.tensor(list(COLOURS.values())).float() / 255
        maps = torch.zeros(*word_index.shape[:2], 16)
        for b, w in word_index[..., 0].ge(0).nonzero().tolist():
            tokens = word_index[b, w]
            (colour,) = (token - first for token in input_ids[b, tokens[tokens >= 0]].tolist() if token >= first)
            inside = (patches[b] - palette[colour]).norm(dim=1) < 0.1
            maps[b, w] = (inside if kind == "gradcam" else ~inside).float()
        return maps
