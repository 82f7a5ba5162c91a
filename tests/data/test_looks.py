"""Other looks of drawings: the same at every size, in training alone, with masks of what is drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from softmask.data.scenes import draw, layout, looks, write

LOOKS = range(300)


def disc(side: int) -> Image.Image:
    """A red disc of half the side on nothing."""
    image = Image.new("RGBA", (side, side))
    ImageDraw.Draw(image).ellipse((side // 4, side // 4, 3 * side // 4, 3 * side // 4), fill=(200, 40, 40, 255))
    return image


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGBa"), dtype=np.float64)


def test_a_look_is_its_number_and_keeps_the_size() -> None:
    seen = [looks.vary(disc(60), look) for look in LOOKS]
    assert {image.size for image in seen} == {(60, 60)} and {image.mode for image in seen} == {"RGBA"}
    assert all(looks.vary(disc(60), look).tobytes() == seen[look].tobytes() for look in range(40))
    assert len({image.tobytes() for image in seen}) > 0.9 * len(seen)


def test_a_look_is_the_same_at_every_size() -> None:
    for look in range(30):
        small, large = pixels(looks.vary(disc(64), look)), pixels(looks.vary(disc(256), look).reduce(4))
        others = [np.abs(pixels(looks.vary(disc(64), other)) - large).mean() for other in range(30, 60)]
        assert np.abs(small - large).mean() < np.median(others) / 2, look  # lines are whole pixels


def test_looks_bend_recolour_shade_and_outline_their_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """One change at a time, seen where only this change can be seen."""
    plain = pixels(disc(60))
    covered = plain[..., 3] > 0

    def share(name: str, seen) -> float:
        for other in ("BENT", "RECOLOURED", "SHADED", "OUTLINED"):
            monkeypatch.setattr(looks, other, wanted[other] if other == name else 0.0)
        return float(np.mean([seen(pixels(looks.vary(disc(60), look))) for look in LOOKS]))

    wanted = {name: getattr(looks, name) for name in ("BENT", "RECOLOURED", "SHADED", "OUTLINED")}
    error = 4 * 0.5 / len(LOOKS) ** 0.5
    tests = {
        "BENT": lambda image: (image[..., 3] != plain[..., 3]).any(),
        "RECOLOURED": lambda image: (image[covered] != plain[covered]).any() and (image[~covered] == 0).all(),
        "SHADED": lambda image: image[covered].min() < plain[covered].min() or image[covered].std(0).max() > 5,
        "OUTLINED": lambda image: (image[..., 3] > 0).sum() > covered.sum(),
    }
    for name, seen in tests.items():
        assert abs(share(name, seen) - wanted[name]) < error, name


def test_a_bent_drawing_stays_in_the_picture() -> None:
    """It gets smaller, by at most half of its area, and loses nothing at the sides."""
    side = 80
    full = Image.new("RGBA", (side, side), (200, 40, 40, 255))
    areas = [pixels(looks.vary(full, look))[..., 3].sum() / 255 / side**2 for look in LOOKS]
    assert min(areas) > 0.5 and max(areas) <= 1 and np.mean(areas) < 0.95


def test_share_of_other_looks_in_training_alone() -> None:
    for split in ("train", "val", "test"):
        plain, half, whole = (
            [layout.sample_scene(split, n, varied=percent) for n in range(150)] for percent in (0, 50, 100)
        )
        changed = [one.look is not None for scene in half for one in scene.placements]
        assert all(one.look is None for scene in plain for one in scene.placements)
        if split == "train":
            assert all(one.look is not None for scene in whole for one in scene.placements)
            assert abs(np.mean(changed) - 0.5) < 4 * 0.5 / len(changed) ** 0.5
            assert len({one.look for scene in whole for one in scene.placements}) == len(changed)
        else:
            assert half == plain and whole == plain
        for before, after in zip(plain, whole, strict=True):
            as_drawn = tuple(replace(one, look=None) for one in after.placements)
            assert replace(after, placements=as_drawn) == before


def test_masks_follow_the_look() -> None:
    """That they cover what is drawn is tested in test_scenes.py, with other looks too."""
    masks = [
        [draw.render(layout.sample_scene("train", n, singles=100, varied=varied), 64)[1][0] for n in range(30)]
        for varied in (0, 100)
    ]
    assert sum((one != other).any() for one, other in zip(*masks, strict=True)) > 20


def test_a_share_beyond_all_is_refused() -> None:
    with pytest.raises(ValueError, match="varied: expected 0 to 100 percent, got 101"):
        write.Options(varied=101)
