"""The count of retrieval's memory: COCO-5K fits, and tokens take what is counted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.evaluation import gallery_memory
from benchmarks.evaluation.gallery_memory import GB, SMALL, Noise, Sizes, gallery_bytes, small_scorer
from softmask.evaluation.gallery import build_gallery
from softmask.evaluation.readers import GalleryPlace, Reader


@pytest.mark.parametrize("gallery", ["host", "device"])
def test_coco_fits_a_gpu_of_24_gb_and_a_host_of_64_gb(gallery: GalleryPlace) -> None:
    counted = gallery_bytes(Sizes(gallery=gallery))
    weights = gallery_memory.weight_bytes(gallery_memory.base_384())
    assert 1.5 * GB < weights < 2 * GB  # 210 million, and the momentum encoder
    assert weights + sum(counted["device"].values()) < (6 if gallery == "host" else 18) * GB
    # Every process has captions, matrices and 3 GB of libraries of its own: four of them on one host still fit.
    shared = counted["host"].pop("image tokens", 0)
    assert shared + 4 * (3 * GB + sum(counted["host"].values())) < 64 * GB


@pytest.mark.parametrize("gallery", ["host", "device"])
def test_tokens_take_what_is_counted(gallery: GalleryPlace) -> None:
    kept = build_gallery(small_scorer(gallery), Reader(Noise(3)))
    counted = gallery_bytes(replace(SMALL, images=3, captions=15, gallery=gallery))[gallery]
    assert sum(piece.tokens.nbytes for piece in kept.pieces) == counted["image tokens"]
    assert kept.text_tokens.nbytes == counted["caption tokens"]
