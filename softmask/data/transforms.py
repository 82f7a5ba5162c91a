"""Images to normalized tensors: ALBEF's crop, flip and RandAugment, SoftMask++'s distortions.

Everything works on PIL images, which at 64 to 256 pixels is several times as fast as tensors, and draws from the
`random.Random` that it is given, so that a sample depends only on its seed.
"""

from __future__ import annotations

import io
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError
from torch import Tensor

from softmask.lfs import NOT_THE_FILE, is_pointer

if TYPE_CHECKING:
    from softmask.data.loader import DataConfig

COLOR_WORDS = frozenset(
    ("black", "blue", "brown", "gold", "golden", "gray", "green", "grey", "orange", "pink", "purple", "red", "silver")
    + ("violet", "white", "yellow")
)
RAND_AUGMENT_OPS = (
    "AutoContrast", "Equalize", "Brightness", "Sharpness",
    "ShearX", "ShearY", "TranslateXRel", "TranslateYRel", "Rotate",
)  # fmt: skip


def decode_image(data: bytes) -> Image.Image:
    """The image as RGB: upright by its EXIF orientation, transparent parts on white, the first frame of an animation.

    Raises:
        ValueError: the bytes are not a complete image.
    """
    if is_pointer(data):
        raise ValueError(f"image {NOT_THE_FILE}")
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            return _eight_bits(image).convert("RGB")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image.convert("RGB")
    except UnidentifiedImageError:  # its message names an object in memory
        raise ValueError(
            f"image cannot be decoded ({len(data):,} bytes in a format that Pillow does not know)"
        ) from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, ... on foreign bytes
        raise ValueError(f"image cannot be decoded ({type(error).__name__}: {error})") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale gray levels of 16 or 32 bits to 8; PIL would clip them at 255.

    16 bits are divided by 256. 32 bits have no standard white: it is the least of 255, 2^16 - 1 and 2^32 - 1 that no
    level exceeds, and 1 for fractions up to 1.
    """
    levels = np.asarray(image)
    clear = image.info.get("transparency")
    clear = levels == clear if isinstance(clear, int) else None  # the transparent level
    if levels.dtype.kind == "f":
        levels = levels.astype(np.float64)
        if not np.isfinite(levels).all():
            raise ValueError("levels that are not finite")
        levels = levels * 255 if levels.max() <= 1 else levels
    else:
        levels = levels.astype(np.int64) & 0xFFFFFFFF  # PIL reads unsigned levels of 32 bits as signed ones
    white = (
        1 << 16 if image.mode.startswith("I;16") else next(n for n in (1 << 8, 1 << 16, 1 << 32) if levels.max() < n)
    )
    levels = (levels * 256 // white if white > 256 else levels).clip(0, 255).astype(np.uint8)
    if clear is not None:
        levels[clear] = 255
    return Image.fromarray(levels)


def normalize_images(images: Sequence[np.ndarray], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """B images [H, W, 3] uint8 -> [B, 3, H, W] float32: (x / 255 - mean) / std."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().float()
    center, scale = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (mean, std))
    return pixels.mul_((1 / (255 * scale)).float()).sub_((center / scale).float())


def eval_transform(config: DataConfig) -> Callable[[bytes | Image.Image], Tensor]:
    """The transform of evaluation: encoded or decoded image -> [3, image_size, image_size] float32, normalized.

    `eval_resize` chooses between resizing to a square (bicubic, antialiased; also "auto") and resizing by the shorter
    side, then cropping the middle square. The transform raises ValueError if bytes are not an image.
    """

    def transform(image: bytes | Image.Image) -> Tensor:
        image = decode_image(image) if isinstance(image, bytes) else image.convert("RGB")
        if config.blank:
            return normalize_images([blank(config)], config.mean, config.std)[0]
        image = (middle if config.eval_resize == "crop" else square)(image, config.image_size)
        return normalize_images([np.asarray(image)], config.mean, config.std)[0]

    return transform


def blank(config: DataConfig) -> np.ndarray:
    """A picture of the mean colour, [H, W, 3] uint8."""
    color = np.array([round(255 * value) for value in config.mean], np.uint8)
    return np.broadcast_to(color, (config.image_size, config.image_size, 3))


def square(image: Image.Image, side: int) -> Image.Image:
    return image.resize((side, side), Image.Resampling.BICUBIC)


def middle(image: Image.Image, side: int) -> Image.Image:
    """Resize the shorter side to `side`, then crop the middle square: torchvision's Resize and CenterCrop.

    Images longer than eight times their width are cropped first: resizing all of them would take gigabytes.
    """
    width, height = image.size
    short = min(width, height)
    if max(width, height) > 8 * short:
        left, top = (max(0, (length - 8 * short) // 2) for length in (width, height))
        image = image.crop((left, top, width - left, height - top))
        width, height = image.size
    image = image.resize((side * width // short, side * height // short), Image.Resampling.BICUBIC)
    return image.crop(middle_box(image.size))


def middle_box(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the largest centered square in an image of (width, height)."""
    side = min(size)
    left, top = (round((length - side) / 2) for length in size)
    return left, top, left + side, top + side


class TrainTransform:
    """Random crop, flip, RandAugment and distortions of `config`: PIL image -> [H, W, 3] uint8."""

    def __init__(self, config: DataConfig):
        self.config = config
        self._rand_augment = _rand_augment() if config.rand_augment else None

    def __call__(self, image: Image.Image, rng: random.Random, caption: str = "") -> np.ndarray:
        config = self.config
        if config.blank:
            return blank(config)
        box = crop_box(image.size, config.crop_scale, rng)
        image = image.resize((config.image_size, config.image_size), Image.Resampling.BICUBIC, box=box)
        if config.flip and rng.random() < 0.5:
            image = ImageOps.mirror(image)
        if self._rand_augment:
            with _seeded(rng.getrandbits(32)):
                image = self._rand_augment(image)
        if config.distort:
            keep = config.keep_named_colors and names_color(caption)
            image = distort(image, config, rng, keep_colors=keep)
        return np.asarray(image)


def crop_box(
    size: tuple[int, int], scale: tuple[float, float], rng: random.Random, ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> tuple[int, int, int, int]:
    """RandomResizedCrop's box (left, top, right, bottom): a share of the area in `scale`, log-uniform aspect ratio."""
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    # No box fits a very long image: take the largest centered one with an allowed aspect ratio.
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def names_color(caption: str) -> bool:
    """Whether one of the caption's words is the English name of a basic colour."""
    return not COLOR_WORDS.isdisjoint(re.findall("[a-z]+", caption.lower()))


def distort(image: Image.Image, config: DataConfig, rng: random.Random, *, keep_colors: bool = False) -> Image.Image:
    """SoftMask++'s distortions: colour jitter, grayscale, Gaussian blur, each with its probability. With `keep_colors`
    the hue stays and grayscale is left out."""
    if rng.random() < config.jitter_probability:
        jitter = (*config.jitter[:3], 0.0) if keep_colors else config.jitter
        image = color_jitter(image, jitter, rng)
    if rng.random() < config.grayscale_probability and not keep_colors:
        image = _grayscale(image)
    if rng.random() < config.blur_probability:
        # MoCo's radii are for 224 pixels.
        radius = rng.uniform(*config.blur_radius) * config.image_size / 224
        image = image.filter(ImageFilter.GaussianBlur(radius))
    return image


def color_jitter(image: Image.Image, strength: Sequence[float], rng: random.Random) -> Image.Image:
    """torchvision's ColorJitter(brightness, contrast, saturation, hue): factors in 1 ± strength, in random order."""
    for number in rng.sample(range(4), 4):
        if not strength[number]:
            continue
        if number == 3:
            image = shift_hue(image, rng.uniform(-strength[3], strength[3]))
        else:
            factor = rng.uniform(max(0.0, 1 - strength[number]), 1 + strength[number])
            image = Image.blend((_black, _mean_gray, _grayscale)[number](image), image, factor)
    return image


def _black(image: Image.Image) -> Image.Image:
    return Image.new("RGB", image.size)


def _mean_gray(image: Image.Image) -> Image.Image:
    mean = int(np.asarray(image.convert("L")).mean() + 0.5)  # as ImageEnhance.Contrast, without its slow histogram
    return Image.new("RGB", image.size, (mean, mean, mean))


def _grayscale(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def shift_hue(image: Image.Image, turn: float) -> Image.Image:
    """Turn the hue by `turn` in [-0.5, 0.5] of a full circle, as torchvision's adjust_hue does."""
    hue, saturation, value = image.convert("HSV").split()
    shift = int(turn * 255)
    hue = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _rand_augment() -> Callable[[Image.Image], Image.Image]:
    """ALBEF's RandAugment(2, 7): two operations, each with probability 0.5, without colour operations."""
    from timm.data.auto_augment import RandAugment, rand_augment_ops

    # ALBEF translates by up to 10 of 256 pixels and interpolates bilinearly; timm's defaults differ.
    options = {"translate_pct": 10 / 256, "interpolation": Image.Resampling.BILINEAR}
    ops = rand_augment_ops(magnitude=7, prob=0.5, hparams=options, transforms=list(RAND_AUGMENT_OPS))
    return RandAugment([_identity, *ops], num_layers=2)


def _identity(image: Image.Image) -> Image.Image:
    return image


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, which timm draws from, and restore them."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
