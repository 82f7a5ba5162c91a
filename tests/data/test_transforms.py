"""Decoding, crop, distortions and the evaluation transform."""

from __future__ import annotations

import io
import random
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as tv

from softmask.data import DataConfig, decode_image, eval_transform
from softmask.data import transforms as T
from tests.support.data_files import make_image


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def photo(seed: int = 0, size: tuple[int, int] = (48, 40)) -> Image.Image:
    small = Image.open(io.BytesIO(make_image(seed, size=(6, 5))))
    return small.resize(size, Image.Resampling.BICUBIC)


def test_image_modes_become_rgb():
    red = Image.new("RGB", (4, 3), (255, 0, 0))
    for mode, expected in {"RGB": (255, 0, 0), "L": (76, 76, 76), "P": (255, 0, 0), "1": (0, 0, 0)}.items():
        image = decode_image(encoded(red.convert(mode, dither=Image.Dither.NONE)))
        assert (image.mode, image.size, image.getpixel((1, 1))) == ("RGB", (4, 3), expected), mode
    assert decode_image(encoded(red.convert("CMYK"), "TIFF")).getpixel((0, 0)) == (255, 0, 0)
    deep = Image.fromarray(np.full((3, 4), 0x4080, np.uint16))
    assert decode_image(encoded(deep)).getpixel((0, 0)) == (0x40, 0x40, 0x40), "16 bits are scaled, not clipped"


def test_exif_orientation_is_applied():
    """Orientation 6: the camera was rotated, and the left edge belongs on top."""
    image = Image.new("RGB", (6, 4), "blue")
    image.paste("red", (0, 0, 3, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    for form in ("PNG", "WEBP", "TIFF"):
        file = io.BytesIO()
        image.save(file, form, exif=exif, lossless=True)
        upright = decode_image(file.getvalue())
        assert upright.size == (4, 6)
        assert (upright.getpixel((1, 0)), upright.getpixel((1, 5))) == ((255, 0, 0), (0, 0, 255)), form


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        (np.array([[0, 0x4000, 0xFFFF]], np.uint16), [0, 0x40, 255]),
        (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),
        (np.array([[0, 0x4000, 0xFFFF]], np.int32), [0, 0x40, 255]),
        (np.array([[0, 0x40000000, -1]], np.int32), [0, 0x40, 255]),  # unsigned 32 bits, as PIL reads them
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 127, 255]),
        (np.array([[-3.0, 64.0, 255.0]], np.float32), [0, 64, 255]),
    ],
)
def test_deep_images_are_scaled_to_8_bits(levels, expected):
    image = decode_image(encoded(Image.fromarray(levels), "TIFF"))
    assert [image.getpixel((x, 0)) for x in range(3)] == [(level,) * 3 for level in expected]


def test_sixteen_bit_png_with_a_transparent_level():
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 0x4000, 0x8000]], np.uint16)).save(file, "PNG")
    data, chunk = file.getvalue(), b"tRNS" + (0x4000).to_bytes(2, "big")
    place = data.index(b"IDAT") - 4
    data = data[:place] + (2).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + data[place:]
    assert [decode_image(data).getpixel((x, 0))[0] for x in range(3)] == [0, 255, 0x80]


def test_git_lfs_pointer_is_refused():
    with pytest.raises(ValueError, match="image is a pointer of git-lfs, not the file: run git lfs pull"):
        decode_image(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")


def test_nan_levels_are_refused():
    with pytest.raises(ValueError, match="levels that are not finite"):
        decode_image(encoded(Image.fromarray(np.array([[0.0, np.nan]], np.float32)), "TIFF"))


def test_transparent_parts_are_white():
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    half.putpixel((1, 0), (0, 0, 0, 0))
    for data in (encoded(half), encoded(half, "WEBP", lossless=True), encoded(half.quantize(), "PNG")):
        image = decode_image(data)
        assert [image.getpixel((0, 0)), image.getpixel((1, 0))] == [(255, 0, 0), (255, 255, 255)]
    half.putpixel((1, 0), (0, 0, 0, 128))
    assert decode_image(encoded(half)).getpixel((1, 0)) == (127, 127, 127)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_truncated_images_are_refused(form):
    data = make_image(0, form=form)
    assert decode_image(data).size == (40, 32)
    for broken in (data[: len(data) // 2], data[:40], b"", b"<html>not found</html>"):
        with pytest.raises(ValueError, match="image cannot be decoded"):
            decode_image(broken)


def test_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="DecompressionBombError"):
        decode_image(make_image(0))


def test_normalize_against_float64():
    pixels = [np.random.default_rng(s).integers(0, 256, (5, 7, 3), np.uint8) for s in range(2)]
    config = DataConfig()
    out = T.normalize_images(pixels, config.mean, config.std)
    truth = (np.stack(pixels).astype(np.float64) / 255 - config.mean) / config.std
    truth = torch.from_numpy(truth).permute(0, 3, 1, 2)
    assert out.dtype == torch.float32 and out.is_contiguous() and out.shape == (2, 3, 5, 7)
    # four roundings of values below 4: the two constants, the product, the difference
    assert (out.double() - truth).abs().max() <= 4 * 4 * 2**-24


@pytest.mark.parametrize("size", [16, 64])
def test_eval_transform(size):
    config = DataConfig(image_size=size)
    transform = eval_transform(config)
    data = encoded(photo(1, (90, 50)))
    out = transform(data)
    assert out.shape == (3, size, size) and out.dtype == torch.float32
    assert torch.equal(out, transform(decode_image(data)))
    resized = tv.resize(decode_image(data), [size, size], tv.InterpolationMode.BICUBIC)
    assert torch.equal(out, T.normalize_images([np.asarray(resized)], config.mean, config.std)[0])
    with pytest.raises(ValueError):
        transform(b"")


@pytest.mark.parametrize("size", [(90, 50), (51, 90), (64, 64), (33, 200), (7, 5), (40, 320)])
def test_center_crop_equals_torchvision(size):
    config = DataConfig(image_size=24, eval_resize="crop")
    image = photo(1, size)
    resized = tv.center_crop(tv.resize(image, 24, tv.InterpolationMode.BICUBIC), [24, 24])
    expected = T.normalize_images([np.asarray(resized)], config.mean, config.std)[0]
    assert torch.equal(eval_transform(config)(image), expected)
    left, top, right, bottom = T.middle_box(size)
    assert right - left == bottom - top == min(size) and left >= 0 and right <= size[0] and bottom <= size[1]
    assert abs((left + right) - size[0]) <= 1 and abs((top + bottom) - size[1]) <= 1


def test_center_crop_of_a_very_long_image_takes_little_memory():
    config = DataConfig(image_size=384, eval_resize="crop")
    image = Image.new("RGB", (1, 60_000), (10, 20, 30))
    assert eval_transform(config)(image).shape == (3, 384, 384)  # resized before cropping, it would take 26 GB


def test_crop_boxes():
    rng = random.Random(0)
    width, height = 200, 100
    boxes = [T.crop_box((width, height), (0.2, 0.8), rng) for _ in range(2000)]
    sizes = np.array([(r - x, b - y) for x, y, r, b in boxes], float)
    assert all(0 <= x < r <= width and 0 <= y < b <= height for x, y, r, b in boxes)
    # Half a pixel of rounding on either side.
    half = 0.5 / sizes.min(axis=1)
    area, ratio = sizes.prod(axis=1) / (width * height), sizes[:, 0] / sizes[:, 1]
    assert (area >= 0.2 * (1 - half) ** 2).all() and (area <= 0.8 * (1 + half) ** 2).all()
    assert (ratio >= 0.75 * (1 - half) / (1 + half)).all() and (ratio <= 4 / 3 * (1 + half) / (1 - half)).all()
    assert area.min() < 0.25 and ratio.min() < 0.8 and ratio.max() > 1.25
    assert T.crop_box((50, 50), (1.0, 1.0), random.Random(1)) == (0, 0, 50, 50)


@pytest.mark.parametrize("size", [(1000, 3), (3, 1000), (1, 1)])
def test_crop_of_extreme_shapes(size):
    for seed in range(50):
        left, top, right, bottom = T.crop_box(size, (0.9, 1.0), random.Random(seed))
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        if max(size) > 1:
            assert (right - left) / (bottom - top) == pytest.approx(1, rel=0.34)


@pytest.mark.parametrize("turn", [-0.5, -0.1, -0.003, 0.0, 0.07, 0.5])
def test_hue_equals_torchvision(turn):
    assert np.array_equal(T.shift_hue(photo(), turn), tv.adjust_hue(photo(), turn))


@pytest.mark.parametrize("seed", range(4))
def test_jitter_equals_torchvision(seed):
    """By replaying the random numbers with torchvision's functions."""
    ours = T.color_jitter(photo(seed), (0.4, 0.4, 0.4, 0.1), random.Random(seed))
    rng, image = random.Random(seed), photo(seed)
    functions = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
    for number in rng.sample(range(4), 4):
        image = (
            tv.adjust_hue(image, rng.uniform(-0.1, 0.1))
            if number == 3
            else functions[number](image, rng.uniform(0.6, 1.4))
        )
    assert np.array_equal(ours, image)
    assert not np.array_equal(ours, photo(seed))
    assert T.color_jitter(photo(), (0, 0, 0, 0), random.Random(0)).tobytes() == photo().tobytes()


@pytest.mark.parametrize(("name", "probability"), [("jitter", 0.8), ("grayscale", 0.2), ("blur", 0.5)])
def test_distortions_have_their_probability(name, probability):
    """With one distortion on, the image changes as often as expected, within 4 standard deviations of the binomial."""
    options = {f"{other}_probability": 0.0 for other in ("jitter", "grayscale", "blur") if other != name}
    config = DataConfig(image_size=224, **options)
    image, trials = photo(), 1500
    changed = sum(T.distort(image, config, random.Random(s)).tobytes() != image.tobytes() for s in range(trials))
    slack = 4 * (trials * probability * (1 - probability)) ** 0.5
    # A blur with a tiny radius or a jitter near 1 may change no 8-bit pixel: rare, and only lowers the count.
    assert probability * trials - slack - 0.05 * trials <= changed <= probability * trials + slack


def test_grayscale_has_three_equal_channels():
    config = DataConfig(jitter_probability=0, blur_probability=0, grayscale_probability=1)
    out = np.asarray(T.distort(photo(), config, random.Random(0)))
    assert (out[..., :1] == out).all() and np.array_equal(out[..., 0], np.asarray(photo().convert("L")))


def test_blur_scales_with_the_image():
    config = dict(jitter_probability=0, grayscale_probability=0, blur_probability=1, blur_radius=(2.0, 2.0))

    def sharpness(size):
        out = T.distort(photo(), DataConfig(image_size=size, **config), random.Random(0))
        return np.abs(np.diff(np.asarray(out, float), axis=0)).mean()

    assert sharpness(448) < sharpness(224) < sharpness(32) <= np.abs(np.diff(np.asarray(photo(), float), axis=0)).mean()


@pytest.mark.parametrize("options", [{}, {"rand_augment": True}, {"distort": False, "flip": False}])
def test_train_transform_depends_on_its_seed_only(options):
    transform = T.TrainTransform(DataConfig(image_size=24, **options))
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = [transform(photo(), random.Random(seed)) for seed in range(6)]
    random.random(), np.random.rand()
    second = [transform(photo(), random.Random(seed)) for seed in range(6)]
    random.setstate(states[0])
    assert first[0].shape == (24, 24, 3) and first[0].dtype == np.uint8
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({a.tobytes() for a in first}) == 6
    assert torch.equal(torch.get_rng_state(), states[2])


def test_rand_augment_leaves_the_global_generators():
    transform = T.TrainTransform(DataConfig(image_size=24, rand_augment=True))
    before = random.getstate(), np.random.get_state()
    transform(photo(), random.Random(0))
    after = random.getstate(), np.random.get_state()
    assert before[0] == after[0]
    assert before[1][2:] == after[1][2:] and np.array_equal(before[1][1], after[1][1])


def test_rand_augment_uses_the_ops_of_albef():
    ops = T.TrainTransform(DataConfig(rand_augment=True))._rand_augment.ops
    assert len(ops) == 10
    names = {op.name for op in ops[1:]}
    assert names == set(T.RAND_AUGMENT_OPS)
    assert not names & {"Color", "Posterize", "Solarize", "Invert", "Contrast"}
    assert {(op.prob, op.magnitude) for op in ops[1:]} == {(0.5, 7)}


def test_half_of_the_images_are_flipped():
    config = DataConfig(image_size=40, crop_scale=(1.0, 1.0), distort=False)
    transform, image = T.TrainTransform(config), photo(3, (40, 40))
    plain = np.asarray(image)
    trials = 400
    flipped = 0
    for seed in range(trials):
        out = transform(image, random.Random(seed))
        if out.tobytes() == np.ascontiguousarray(plain[:, ::-1]).tobytes():
            flipped += 1
    whole = sum(T.crop_box((40, 40), (1.0, 1.0), random.Random(seed)) == (0, 0, 40, 40) for seed in range(trials))
    assert abs(flipped - whole / 2) <= 4 * (whole / 4) ** 0.5


def test_timm_is_needed_for_rand_augment_only():
    code = (
        "import sys, random; from PIL import Image; from softmask.data import DataConfig;"
        "from softmask.data.transforms import TrainTransform;"
        "TrainTransform(DataConfig(image_size=8))(Image.new('RGB', (9, 9)), random.Random(0));"
        "sys.exit('timm' in sys.modules or 'transformers' in sys.modules or 'torchvision' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_blank_pictures_are_grey_in_training_and_evaluation() -> None:
    config = DataConfig(image_size=8, blank=True)
    picture = Image.new("RGB", (20, 10), (255, 0, 0))
    trained = T.normalize_images([T.TrainTransform(config)(picture, random.Random(0))], config.mean, config.std)[0]
    evaluated = eval_transform(config)(picture)
    assert trained.shape == (3, 8, 8) and trained.abs().max() < 0.01 and torch.equal(trained, evaluated)
    with pytest.raises(ValueError, match="cannot be decoded"):
        eval_transform(config)(b"no picture")
