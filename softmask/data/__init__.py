"""Captioned images: sources, loader, tokenizer, transforms."""

from softmask.batch import Batch
from softmask.data.loader import DataConfig, Loader
from softmask.data.records import DataError, Record, SampleError, Source
from softmask.data.sources import open_source
from softmask.data.text import CaptionTokenizer, TokenBatch, train_wordpiece
from softmask.data.transforms import decode_image, eval_transform

__all__ = [
    "Batch", "CaptionTokenizer", "DataConfig", "DataError", "Loader", "Record", "SampleError", "Source", "TokenBatch",
    "decode_image", "eval_transform", "open_source", "train_wordpiece",
]  # fmt: skip
