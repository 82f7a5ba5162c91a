"""Memory of retrieval, counted from shapes, beside the measured growth of a scaled run.

    python -m benchmarks.evaluation.gallery_memory             # COCO-5K at 384 px, k 256, by count
    python -m benchmarks.evaluation.gallery_memory --measure   # a small model on the CPU: galleries of two sizes

The scaled run is this process's own peak: run it alone in a process for every size, as `--measure` does.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from softmask.data import DataConfig, Record, TokenBatch
from softmask.evaluation.one_pass import measure_one
from softmask.evaluation.readers import GalleryPlace, Reader, Scorer
from softmask.evaluation.retrieval import Recalls
from softmask.models import ConvViTConfig, SoftMaskPP, SoftMaskPPConfig, SpecialIds, TextConfig, VisionConfig
from softmask.training.config import Config, TrainConfig

SPECIAL = SpecialIds(pad=0, cls=1, sep=2, mask=3)
GB = 1e9
SCORE_BYTES = {  # of a pair of image and caption, at the peak: the second direction is re-ranked
    "similarity": 4, "right pairs": 1, "candidates of both directions": 2, "matching scores": 4,
    "image to text, re-ranked": 8, "text to image, re-ranked, twice while its rows are joined": 16,
}  # fmt: skip
VIT_WIDTHS = 10  # activations of a layer that are alive at once, in widths: states, norm, query to value, MLP and GELU


@dataclass(frozen=True)
class Sizes:
    """A gallery, its model's shapes and the candidates of each query. Defaults: COCO-5K with ViT-B/16 at 384 px."""

    images: int = 5000
    captions: int = 25_000
    patches: int = 577  # with [CLS]
    tokens: int = 30
    image_width: int = 768
    text_width: int = 768
    embed_dim: int = 256
    fusion_layers: int = 6
    image_size: int = 384
    picture_bytes: int = 640 * 480 * 3
    batch_size: int = 64
    rerank: int = 256
    gallery: GalleryPlace = "host"


def gallery_bytes(sizes: Sizes) -> dict[str, dict[str, int]]:
    """What one process keeps and needs at once, "host" and "device" -> what for -> bytes, without the model."""
    each = 2 if sizes.gallery == "host" else 4
    image_tokens = sizes.images * sizes.patches * sizes.image_width * each
    text_tokens = sizes.captions * sizes.tokens * sizes.text_width * each
    pairs, batch = sizes.images * sizes.captions, sizes.batch_size
    together = max(1, batch // min(sizes.rerank, sizes.captions))  # images of a pass, at most
    keys = 2 * sizes.fusion_layers * sizes.patches * sizes.text_width * 4
    waiting = {"image tokens": image_tokens, "caption tokens": text_tokens}
    pixels = batch * 3 * sizes.image_size**2 * 4
    host = {name: each * pairs for name, each in SCORE_BYTES.items()}
    host |= {"a batch of pictures": batch * sizes.picture_bytes + 2 * pixels}
    device = {
        "features": (sizes.images + sizes.captions) * sizes.embed_dim * 4,
        "similarity": 4 * pairs,
        "a batch of images": pixels + VIT_WIDTHS * batch * sizes.patches * sizes.image_width * 4,
        "a pass: keys and values": together * keys,
        "a pass: captions": VIT_WIDTHS * batch * sizes.tokens * sizes.text_width * 4,
    }
    (host if sizes.gallery == "host" else device).update(waiting)
    return {"host": host, "device": device}


def weight_bytes(config: SoftMaskPPConfig) -> int:
    """Weights and buffers of the model in fp32, the momentum encoder among them."""
    with torch.device("meta"):
        model = SoftMaskPP(config, special_ids=SPECIAL)
    return sum(one.numel() * one.element_size() for one in [*model.parameters(), *model.buffers()])


def base_384() -> SoftMaskPPConfig:
    vision = VisionConfig(name="vit_base_patch16_224", image_size=384)
    return SoftMaskPPConfig(vision=vision, text=TextConfig(vocab_size=30522))


# -- the scaled run --------------------------------------------------------------------------------

SMALL = Sizes(
    patches=257, tokens=24, image_width=192, text_width=192, embed_dim=16, fusion_layers=2, image_size=128,
    picture_bytes=32 * 32 * 3, rerank=1,
)  # fmt: skip


class Noise:
    """Noise with five captions a picture, made when it is read."""

    def __init__(self, images: int) -> None:
        self.image_ids = np.arange(images).repeat(5)

    def __len__(self) -> int:
        return len(self.image_ids)

    def read(self, index: int, *, extra: bool = False) -> Record:
        image_id = int(self.image_ids[index])
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(image_id).integers(0, 255, (32, 32, 3), np.uint8)).save(file, "PNG")
        return Record(file.getvalue(), str(index), image_id, str(index))


def tokenizer(captions: list[str], **_: Any) -> TokenBatch:
    """Full captions whose words spell their numbers."""
    shape = (len(captions), SMALL.tokens)
    ids = 4 + torch.tensor([int(text) for text in captions])[:, None] // 7 ** torch.arange(SMALL.tokens) % 7
    spans = torch.zeros(*shape, 2, dtype=torch.int64)
    return TokenBatch(ids, ids > 0, torch.zeros_like(ids), spans, torch.zeros(len(captions), dtype=torch.bool))


def small_scorer(gallery: GalleryPlace) -> Scorer:
    conv_vit = ConvViTConfig(patch_size=8, width=SMALL.image_width, depth=1, heads=3, stem_width=4)
    text = TextConfig(
        vocab_size=16, width=SMALL.text_width, heads=3, intermediate_size=192, text_layers=1,
        fusion_layers=SMALL.fusion_layers, max_positions=32,
    )  # fmt: skip
    vision = VisionConfig(name="conv_vit", image_size=SMALL.image_size, conv_vit=conv_vit)
    model = SoftMaskPPConfig(vision=vision, text=text, embed_dim=SMALL.embed_dim, queue_size=0, cam_layer=0)
    data = DataConfig(train="none.tar", image_size=SMALL.image_size, max_length=SMALL.tokens)
    config = Config(output="none", train=TrainConfig(steps=1), model=model, data=data)
    torch.manual_seed(0)
    scorer = Scorer(SoftMaskPP(model, special_ids=SPECIAL).eval(), tokenizer, config, batch_size=SMALL.batch_size)
    scorer.gallery = gallery
    return scorer


def peak_of(images: int, gallery: GalleryPlace) -> int:
    """Bytes of this process's peak, after retrieval of so many pictures."""
    reader = Reader(Noise(images))
    scorer = small_scorer(gallery)
    measure_one(scorer, reader, Recalls(scorer, rerank=SMALL.rerank))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(few: int, many: int, gallery: GalleryPlace) -> str:
    """Growth of the peak between two galleries beside the count, host and device together: both are the host."""
    peaks, counts = [], []
    for images in (few, many):
        command = [sys.executable, "-m", "benchmarks.evaluation.gallery_memory", "--peak", str(images), gallery]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        counted = gallery_bytes(replace(SMALL, images=images, captions=5 * images, gallery=gallery))
        counts.append(sum(sum(part.values()) for part in counted.values()))
    grown, counted_growth = (1e-6 * (many_ - few_) for few_, many_ in (peaks, counts))
    return f"--gallery {gallery}, {few} to {many} pictures: peak + {grown:.0f} MB, counted + {counted_growth:.0f} MB"


def table(sizes: Sizes) -> str:
    counted = gallery_bytes(sizes)
    counted["device"]["weights"] = weight_bytes(base_384())
    lines = [f"{sizes.images} images, {sizes.captions} captions, k {sizes.rerank}, --gallery {sizes.gallery}"]
    for place, parts in counted.items():
        lines += [f"  {place:6} {value / GB:6.2f} GB  {name}" for name, value in parts.items()]
        lines.append(f"  {place:6} {sum(parts.values()) / GB:6.2f} GB  in all")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="also run small galleries and measure their peaks")
    parser.add_argument("--peak", nargs=2, metavar=("IMAGES", "GALLERY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(json.dumps(peak_of(int(options.peak[0]), options.peak[1])))
        return
    for gallery in ("host", "device"):
        print(table(replace(Sizes(), gallery=gallery)))
    for gallery in ("host", "device") if options.measure else ():
        print(measure(200, 1000, gallery), flush=True)


if __name__ == "__main__":
    main()
