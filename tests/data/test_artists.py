"""Scenes drawn by several artists: icon sets as npm packs them, unseen artists, licences."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from softmask.data.scenes import artists, drawings, layout, write
from softmask.data.scenes.concepts import concepts, unicode_names

BY_NAME = {concept.name: number for number, concept in enumerate(concepts())}
SQUARE = '<path fill="{}" d="M2 2h12v12H2z"/>'


def put_package(folder: Path, name: str, icons: dict[str, str], *, chars: dict[str, str] | None = None) -> None:
    """`@iconify-json/NAME` in a folder's node_modules, with squares of the icons' colours."""
    package = folder / "node_modules" / "@iconify-json" / name
    package.mkdir(parents=True)
    content = {
        "icons.json": {
            "icons": {icon: {"body": SQUARE.format(colour)} for icon, colour in icons.items()},
            "aliases": {"pooch": {"parent": "dog"}},
        },
        "info.json": {"name": name.title(), "author": {"name": "Ann"}, "license": {"title": "CC0"}},
        "package.json": {"version": "1.2.3"},
    } | ({} if chars is None else {"chars.json": chars})
    for file, value in content.items():
        (package / file).write_text(json.dumps(value))


@pytest.fixture
def icon_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Red and blue draw twelve concepts, green eleven; nothing is fetched."""
    names = [concept.name for concept in concepts() if concept.form == "count"][:12]
    icons = {unicode_names(concepts()[BY_NAME[name]])[0]: "red" for name in names}
    put_package(tmp_path, "red", icons)
    put_package(tmp_path, "blue", dict.fromkeys(icons, "blue"))
    put_package(tmp_path, "green", dict.fromkeys(list(icons)[1:], "green"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caches = (artists.drawing_set, drawings.has_drawing, drawings.drawing_of, layout.drawn_concepts)
    for cached in caches:
        cached.cache_clear()
    yield tmp_path
    for cached in caches:
        cached.cache_clear()


def test_concepts_are_found_by_code_point_name_and_alias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dog, cat = concepts()[BY_NAME["dog"]], concepts()[BY_NAME["cat"]]
    put_package(tmp_path, "some", {"dog": "red", "tom": "blue"}, chars={f"{ord(cat.emoji):x}": "tom"})
    found = artists.Iconify("some", tmp_path / "node_modules" / "@iconify-json" / "some")
    assert "red" in found.svg(dog) and "blue" in found.svg(cat)
    assert found.svg(concepts()[BY_NAME["owl"]]) is None
    monkeypatch.setattr(artists, "unicode_names", lambda _: ["pooch"])
    assert "red" in found.svg(concepts()[BY_NAME["owl"]])
    image = artists.rasterize(found.svg(dog))
    assert image.size == (120, 120) and image.getpixel((60, 60)) == (255, 0, 0, 255)


def test_openmoji_draws_every_concept() -> None:
    assert layout.drawn_concepts((("openmoji",),)) == list(range(len(concepts())))


def test_artists_draw_equally_often(icon_sets: Path) -> None:
    """Red and blue are versions by one vendor and count as one artist; a concept that green lacks is theirs."""
    scenes = [layout.sample_scene("train", n, hands=(("red", "blue"), ("green",))) for n in range(400)]
    everyone = [p for scene in scenes for p in scene.placements]
    first = min(p.concept for p in everyone)
    drawn = np.array([p.drawn_by for p in everyone if p.concept != first])
    share = {name: (drawn == name).mean() for name in ("red", "blue", "green")}
    assert abs(share["green"] - 0.5) < 5 * 0.5 / len(drawn) ** 0.5
    assert abs(share["red"] - 0.25) < 5 * 0.5 / len(drawn) ** 0.5 and share["blue"] > 0
    assert {p.drawn_by for p in everyone if p.concept == first} == {"red", "blue"}
    assert scenes[7] == layout.sample_scene("train", 7, hands=(("red", "blue"), ("green",)))


def test_seen_and_test_splits_differ_only_in_the_artist(icon_sets: Path) -> None:
    """All squares have one shape, so that positions and captions must be equal."""
    for number in range(30):
        test, seen = (
            layout.sample_scene(split, number, hands=((name,),)) for split, name in (("test", "blue"), ("seen", "red"))
        )
        assert test.caption == seen.caption and test.groups == seen.groups
        assert {p.drawn_by for p in test.placements} == {"blue"} and {p.drawn_by for p in seen.placements} == {"red"}


def test_share_of_scenes_with_a_single_drawing(icon_sets: Path) -> None:
    """Only training's scenes change, and those that keep their number of drawings stay as they are."""

    def drawings(split: layout.Split, singles: int) -> list[int]:
        hands = (("red", "blue"), ("green",))
        scenes = [layout.sample_scene(split, number, hands=hands, singles=singles) for number in range(200)]
        return [len(scene.placements) for scene in scenes]

    mixed, half, whole = (drawings("train", singles) for singles in (0, 50, 100))
    assert set(whole) == {1} and mixed.count(1) < 60
    changed = [after for before, after in zip(mixed, half, strict=True) if before != after]
    assert set(changed) == {1} and 50 < len(changed) < 110
    assert drawings("val", 100) == drawings("val", 0) and drawings("test", 100) == drawings("test", 0)
    alone = [layout.sample_scene("train", n, hands=(("red", "blue"),), singles=100).caption.text for n in range(60)]
    assert not any("background" in text for text in alone)
    with pytest.raises(ValueError, match="singles: expected 0 to 100 percent, got 101"):
        write.Options(singles=101)


def test_splits_with_unseen_artists(icon_sets: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["--out", str(icon_sets / "set"), "--train", "4", "--val", "2", "--test", "3", "--size", "32"]
    command += ["--test-size", "32", "--processes", "1"]
    assert write.main([*command, "--artists", "red", "--val-artists", "green", "--test-artists", "blue"]) == 0
    printed = capsys.readouterr().out
    for name in ("Red", "Green", "Blue"):
        line = f"{name} by Ann (), CC0 (), @iconify-json/{name.lower()} 1.2.3"
        assert line in printed and line in (icon_sets / "set" / "ATTRIBUTION.txt").read_text()
    counts = {}
    for shard in sorted((icon_sets / "set").glob("*.tar")):
        with tarfile.open(shard) as archive:
            counts[shard.name.split("-")[0]] = sum(name.endswith(".png") for name in archive.getnames())
    assert counts == {"seen": 3, "test": 3, "train": 4, "val": 2}
    assert write.main([*command, "--artists", "red", "--val-artists", "green", "--test-artists", "blue"]) == 0
    assert "is up to date" in capsys.readouterr().out
    assert write.main([*command, "--artists", "red,green", "--val-artists", "green"]) == 1
    assert "val_artists: expected hands that do not draw train, got green" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--artists", "few"], ["--artists", ""], ["--artists", "red", "--test-artists", "few"]]
)
def test_too_few_drawings_are_refused(icon_sets: Path, capsys: pytest.CaptureFixture, options: list[str]) -> None:
    put_package(icon_sets, "few", {"dog": "red", "cat": "red", "cow": "red"})
    command = ["--out", str(icon_sets / "set"), "--train", "2", "--val", "2", "--test", "2", "--val-artists", "green"]
    defaults = [] if "--test-artists" in options else ["--test-artists", "blue"]
    assert write.main([*command, *options, *defaults]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "expected drawings of at least 10 of the 400 concepts, got" in line and not (icon_sets / "set").exists()


def test_versions_of_one_vendor_count_as_one_artist() -> None:
    with pytest.raises(ValueError, match="test_artists: expected hands that do not draw train, got noto-v1"):
        write.Options(artists=("openmoji", "noto"), test_artists=("noto-v1",))
    with pytest.raises(ValueError, match="val_artists: expected hands that do not draw train, got emojione$"):
        write.Options(artists=("openmoji", "emojione-v1"), test_artists=("noto-v1",))
    options = write.Options(artists=("openmoji", "noto"))
    assert options.hands("train") == options.hands("seen") == (("openmoji",), ("noto", "noto-v1"))
    assert options.hands("val") == (("emojione",),) and options.hands("test") == (("twemoji",),)
    alone = write.Options()
    assert all(alone.hands(split) == (("openmoji",),) for split in layout.SPLITS) and alone.count("seen") == 0


@pytest.mark.parametrize(
    ("npm", "message"),
    [
        (None, r"artist 'azure': @iconify-json/azure@latest is not here and npm, .* is not installed; install npm, or"),
        ("echo no such package >&2; exit 1", r"npm pack @iconify-json/azure@latest failed \(no such package\)"),
        ("exit 0", r"npm pack @iconify-json/azure@latest failed \(no archive\)"),
    ],
)
def test_icon_set_that_cannot_be_fetched_is_one_line(
    icon_sets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, npm: str | None, message: str
) -> None:
    programs = icon_sets / "bin"
    programs.mkdir()
    if npm is not None:
        (programs / "npm").write_text(f"#!/bin/sh\n{npm}\n")
        (programs / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    assert write.main(["--out", str(icon_sets / "set"), "--artists", "azure"]) == 1
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1
    with pytest.raises(artists.ArtistError, match=message):
        artists.drawing_set("azure")
    assert printed.strip() == str(pytest.raises(artists.ArtistError, artists.drawing_set, "azure").value)


def test_npm_archive_is_unpacked_once(icon_sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_package(icon_sets / "made", "azure", {"dog": "red"})
    with tarfile.open(icon_sets / "azure.tgz", "w:gz") as archive:
        archive.add(icon_sets / "made" / "node_modules" / "@iconify-json" / "azure", "package")
    (icon_sets / "bin").mkdir()
    (icon_sets / "bin" / "npm").write_text(
        f"#!/bin/sh\n/bin/cp {icon_sets}/azure.tgz . && echo $* >> {icon_sets}/calls\n"
    )
    (icon_sets / "bin" / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(icon_sets / "bin"))
    for _ in range(2):
        artists.drawing_set.cache_clear()
        assert artists.drawing_set("azure").svg(concepts()[BY_NAME["dog"]])
    assert (icon_sets / "calls").read_text() == "pack --silent @iconify-json/azure@latest\n"
    assert (icon_sets / "cache" / "softmask" / "drawings" / "azure-latest" / "icons.json").is_file()
