"""The documented commands for COCO-5K and Flickr30K run as they stand, on a small file in Karpathy's format."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from softmask.evaluation import evaluate
from tests.support.evaluation_files import PAIRS, scene, write_run, write_scenes

DOCS = Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"
SECTION = DOCS.read_text(encoding="utf-8").partition("## COCO-5K")[2].partition("\n## ")[0]
COMMANDS = [shlex.split(block.replace("\\\n", "")) for block in re.findall(r"```\n(.*?)```", SECTION, re.DOTALL)]
FOLDERS = {"dataset_coco.json": "val2014", "dataset_flickr30k.json": "flickr30k_images"}


def write_karpathy(path: Path, folder: str, *, root: Path) -> None:
    """Twelve pictures with five captions each, three of the training split."""
    (root / folder).mkdir(parents=True)
    images = []
    for number, (left, right) in enumerate(PAIRS):
        (root / folder / f"{number}.png").write_bytes(scene(number)[0][1])
        texts = [f"a {left} {thing} beside a {right} one" for thing in ("box", "one", "red", "green", "blue")]
        split = "train" if number < 3 else "test"
        image = {"filename": f"{number}.png", "split": split, "sentences": [{"raw": text} for text in texts]}
        images.append(image | ({"filepath": folder} if folder == "val2014" else {}))
    path.write_text(json.dumps({"images": images}), encoding="utf-8")


def test_both_are_documented() -> None:
    parsed = [evaluate.parse(command[command.index("train/evaluate.py") + 1 :]) for command in COMMANDS]
    assert [(one.data, one.rerank) for one in parsed] == [("dataset_coco.json", 256), ("dataset_flickr30k.json", 128)]
    assert {(one.pairs, one.image_size, one.text_length, one.split) for one in parsed} == {(0, 384, 30, "test")}


@pytest.mark.parametrize("command", COMMANDS, ids=FOLDERS)
def test_the_command_runs(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a run of small size, whose pictures have 64 instead of 384 px."""
    monkeypatch.chdir(tmp_path)
    run, *arguments = command[command.index("train/evaluate.py") + 1 :]
    made = write_run(tmp_path, write_scenes(tmp_path / "scenes.tar"))
    Path(run).parent.mkdir()
    made.rename(run)
    options = evaluate.parse([run, *arguments])
    write_karpathy(Path(options.data), FOLDERS[options.data], root=Path(options.image_root))
    assert evaluate.main([run, *arguments, "--image-size", "64"]) == 0
    result = json.loads(options.output.read_text())
    found = result["retrieval"]
    assert (found["images"], found["samples"], found["rerank"]) == (9, 45, options.rerank)
    assert found["chance"]["t2i"]["r1"] == pytest.approx(1 / 9)
    assert (result["evaluation"]["image_size"], result["evaluation"]["text_length"]) == (64, 30)
