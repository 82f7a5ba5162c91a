"""Grounding as in RefCOCO: an oracle's figures, a tiny run by the command line, ranks, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from softmask.data import DataError, rle
from softmask.data.formats.refcoco import open_refcoco
from softmask.evaluation import evaluate
from softmask.evaluation.readers import Reader, Scorer
from softmask.evaluation.sections import Evaluation
from softmask.evaluation.tasks.grounding import BoxGrounding
from softmask.finetuning import finetune
from softmask.tasks.downstream import paths_of
from softmask.training.config import save_config
from tests.support.evaluation_files import LEFT, PAIRS, RIGHT, SIDE, Oracle, Words, scene, small_config
from tests.support.format_files import write_json
from tests.support.task_fixtures import finetune_here, pretrained, task_config
from tests.support.train_fixtures import ROOT, run_on_ranks

BOXES = {"left": [0, 8, 8, 16], "right": [24, 8, 8, 16]}
WHOLE = [0, 0, SIDE, SIDE]


def write_files(folder: Path, *, count: int = 12, detections: Any = None, masks: bool = True, **change: Any) -> str:
    """The scenes' boxes with two expressions each, of left and right boxes in turn, so that those of a picture are not
    neighbours; every third scene is unseen. `change` is of the first image's entry. Returns `--data`."""
    images, annotations, expressions = [], [], []
    for number in range(count):
        (folder / f"{number}.png").write_bytes(scene(number)[0][1])
        images.append({"id": number, "file_name": f"{number}.png", "height": SIDE, "width": SIDE})
    images[0] |= change
    for place, (side, window) in enumerate((("left", LEFT), ("right", RIGHT))):
        mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
        mask[window] = True
        for number in range(count):
            key, unseen = 100 * place + number, {"unseen": True} if number % 3 == 0 else {}
            segmentation = rle.encode(mask.numpy()) if masks else []
            annotation = {"id": key, "image_id": number, "bbox": BOXES[side], "segmentation": segmentation}
            annotations.append(annotation)
            colour = PAIRS[number][place]
            sentences = [{"sent": f"a {colour} box", "sent_id": 2 * key}, {"sent": colour, "sent_id": 2 * key + 1}]
            expressions.append({"ann_id": key, "split": "testA", "sentences": sentences, **unseen})
    write_json(folder / "refs.json", expressions)
    write_json(folder / "instances.json", {"images": images, "annotations": annotations})
    if detections is not None:
        write_json(folder / "dets.json", detections)
    names = ["refs", "instances"] + ["dets"] * (detections is not None)
    return ",".join(str(folder / f"{name}.json") for name in names)


def measured(
    folder: Path, data: str, *, batch_size: int = 5, crop: bool = False, max_length: int = 16, **options: Any
) -> dict[str, Any]:
    config = small_config(folder)
    config.data.max_length = max_length
    config.data.eval_resize = "crop" if crop else "squash"
    scorer = Scorer(Oracle(config), Words(), config, batch_size=batch_size)
    reader = Reader(open_refcoco(paths_of(data), split="testA"), config.data)
    given = Evaluation(scorer, reader, **options)
    found = BoxGrounding().run(given)
    return found | {"shown": scorer.model.images_seen, "errors": list(reader.skipped.values())}


@pytest.mark.parametrize("batch_size, shown", [(64, 12), (4, 12), (5, 19), (1, 48)])
def test_oracle_finds_every_box_and_sees_a_picture_once_in_a_piece(tmp_path: Path, batch_size: int, shown: int) -> None:
    rows: list[dict[str, Any]] = []
    found = measured(tmp_path, write_files(tmp_path), batch_size=batch_size, predictions=rows)
    counts = {"expressions": 48, "images": 12, "cut": 0, "without_right_box": 0, "masks": 48}
    shares = {"accuracy": 1.0, "chance": 0.5, "ceiling": 1.0, "pointing": 1.0, "random": 128 / 1024}
    unseen = counts | {"expressions": 16, "images": 4, "masks": 16} | shares
    assert found == counts | shares | {
        "box_score": "mean", "skipped": 0, "unseen": unseen, "shown": shown, "errors": []
    }  # fmt: skip
    assert [row["id"] for row in rows] == [*range(24), *range(200, 224)], "in the order of the file"
    assert [row["box"] for row in rows] == [BOXES["left"]] * 24 + [BOXES["right"]] * 24


def test_detections_replace_the_boxes_and_some_expressions_have_no_right_one(tmp_path: Path) -> None:
    """Scene 0 has no detection, scene 1 none of the right box, the others three of which one is right for each side."""
    near = [BOXES["left"], [23.5, 8, 8, 16], WHOLE]
    detections = {"1": [BOXES["left"]], **{str(number): near for number in range(2, 12)}}
    data = write_files(tmp_path, detections=detections)
    found = measured(tmp_path, data)
    assert (found["without_right_box"], found["accuracy"], found["ceiling"]) == (6, 42 / 48, 42 / 48)
    assert found["chance"] == pytest.approx((2 * 1.0 + 40 / 3) / 48)
    assert found["unseen"]["without_right_box"] == 4


def test_box_score_chooses_between_small_and_large_boxes(tmp_path: Path) -> None:
    """Maps fade between patches, so a quarter of the object has a larger mean than all of it, but a smaller sum over
    the root of its area. A box three times as large loses by both."""
    small, large = [0, 8, 4, 8], [0, 0, 24, 16]
    detections = {str(number): [small, BOXES["left"], large] for number in range(12)}
    data = write_files(tmp_path, detections=detections)
    rows: dict[str, list[dict[str, Any]]] = {"mean": [], "root": []}
    for by, found in rows.items():
        measured(tmp_path, data, box_score=by, predictions=found)
    boxes = {by: {tuple(row["box"]) for row in found[:24]} for by, found in rows.items()}
    assert boxes["root"] == {tuple(BOXES["left"])} and boxes["mean"] == {tuple(small)}


def test_map_without_a_peak_hits_nothing(tmp_path: Path) -> None:
    """A colour that the picture does not show: all boxes have the same score, so their order must not decide."""
    data = write_files(tmp_path, count=1)
    refs = json.loads((tmp_path / "refs.json").read_text())
    for entry in refs:
        entry["sentences"] = [{"sent": "black"}]
    write_json(tmp_path / "refs.json", refs)
    found = measured(tmp_path, data)
    assert (found["accuracy"], found["pointing"], found["chance"]) == (0.0, 0.0, 0.5)


def test_maps_that_are_not_finite_are_named_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a model that has diverged: no box has the largest score then, which must not count as right."""
    data, maps = write_files(tmp_path), Oracle.word_maps

    def broken(self: Oracle, images: torch.Tensor, *given: Any, **options: Any) -> torch.Tensor:
        found = maps(self, images, *given, **options)
        found[0] = torch.nan
        return found

    whole = measured(tmp_path, data)
    monkeypatch.setattr(Oracle, "word_maps", broken)
    found = measured(tmp_path, data)
    missing = whole["expressions"] - found["expressions"]
    assert 0 < missing == sum("is not finite" in one for one in found["errors"]) and found["accuracy"] == 1.0


def test_boxes_alone_leave_the_pointing_game_out(tmp_path: Path) -> None:
    found = measured(tmp_path, write_files(tmp_path, masks=False))
    assert found["accuracy"] == 1.0 and not {"pointing", "masks", "random"} & found.keys()


def test_examples_that_cannot_be_measured_are_named_and_counted(tmp_path: Path) -> None:
    data = write_files(tmp_path, masks=False, height=16)
    (tmp_path / "5.png").unlink()
    found = measured(tmp_path, data)
    assert (found["skipped"], found["expressions"], found["accuracy"]) == (8, 40, 1.0)
    size = [one for one in found["errors"] if "0.png: 32 x 32 pixels, expected 32 x 16 as in the instances" in one]
    gone = [one for one in found["errors"] if "5.png: cannot be read" in one]
    assert (len(size), len(gone)) == (4, 4)


def test_expressions_that_were_cut_are_counted_and_those_without_a_word_left_out(tmp_path: Path) -> None:
    data = write_files(tmp_path)
    assert measured(tmp_path, data, max_length=4)["cut"] == 24
    with pytest.raises(DataError, match=r"no expression can be measured; the first: .*no word is left of 'a red box'"):
        measured(tmp_path, data, max_length=2)


def test_cropped_pictures_keep_their_boxes(tmp_path: Path) -> None:
    """Pictures twice as wide, with the scene in their middle."""
    from PIL import Image

    data = write_files(tmp_path)
    objects = json.loads((tmp_path / "instances.json").read_text())
    for image in objects["images"]:
        wide = Image.new("RGB", (2 * SIDE, SIDE), "white")
        wide.paste(Image.open(tmp_path / image["file_name"]), (SIDE // 2, 0))
        wide.save(tmp_path / image["file_name"])
        image["width"] = 2 * SIDE
    for annotation in objects["annotations"]:
        x, *rest = annotation["bbox"]
        mask = torch.nn.functional.pad(torch.as_tensor(rle.decode(annotation["segmentation"])), (SIDE // 2,) * 2)
        annotation |= {"bbox": [x + SIDE // 2, *rest], "segmentation": rle.encode(mask.numpy())}
    write_json(tmp_path / "instances.json", objects)
    found = measured(tmp_path, data, crop=True)
    assert (found["accuracy"], found["pointing"], found["random"]) == (1.0, 1.0, 128 / 1024)


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained(tmp_path_factory.mktemp("pretrained"))


def options_of(data: str, *more: str) -> list[str]:
    return ["--data", data, "--task", "grounding", "--split", "testA", *more]


def test_figures_are_the_same_on_any_number_of_ranks(tmp_path: Path, init: Path) -> None:
    data = write_files(tmp_path)
    (tmp_path / "5.png").unlink()
    found = []
    for count in (1, 2, 3):
        output, rows = tmp_path / f"{count}.json", tmp_path / f"{count}.rows.json"
        options = options_of(data, "--batch-size", "7", "--output", str(output), "--predictions", str(rows))
        if count == 1:
            assert evaluate.main([str(init), *options]) == 0
        else:
            run_on_ranks(count, ROOT / "train" / "evaluate.py", str(init), *options)
        found.append((json.loads(output.read_text())["grounding"], json.loads(rows.read_text())))
    assert found[0] == found[1] == found[2] and len(found[0][1]) == 44
    assert (found[0][0]["expressions"], found[0][0]["skipped"], found[0][0]["chance"]) == (44, 4, 0.5)


def test_model_of_fine_tuned_retrieval_is_measured(tmp_path: Path, init: Path) -> None:
    """As in ALBEF, whose model is trained on the expressions as captions before it is measured."""
    captions = write_json(
        tmp_path / "captions.json", [{"image": f"{n}.png", "caption": "a red box"} for n in range(12)]
    )
    data, output = write_files(tmp_path), tmp_path / "found.json"
    config = task_config(tmp_path, "retrieval", captions, "train.steps=1", init=init)
    finetune_here(config)
    assert evaluate.main([config.output, *options_of(data, "--output", str(output))]) == 0
    assert json.loads(output.read_text())["grounding"]["expressions"] == 48


def test_there_is_nothing_to_train(tmp_path: Path, init: Path, capfd: pytest.CaptureFixture) -> None:
    config = task_config(tmp_path, "grounding", write_files(tmp_path).split(",")[0], init=init)
    save_config(config, tmp_path / "own.yaml")
    assert finetune.main(["--config", str(tmp_path / "own.yaml")]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert f"task: grounding has nothing to train: python train/evaluate.py {init} --task grounding" in line


@pytest.mark.parametrize("change, words", [
    (["--split", "val"], "refs.json: expected one of the splits testA, got 'val'"),
    (["--data", "{folder}/refs.json"], "expected one file of instances, one of expressions"),
    (["--data", "{folder}/refs.json,{folder}/none.json"], "none.json does not exist"),
    (["--data", "{folder}/refs(unc).p,{folder}/instances.json"], "refs(unc).p is a pickle, expected JSON; if you"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused(
    change: list[str], words: str, tmp_path: Path, init: Path, capfd: pytest.CaptureFixture
) -> None:
    data = write_files(tmp_path)
    (tmp_path / "refs(unc).p").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    given = [option.format(folder=tmp_path) for option in change]
    assert evaluate.main([str(init), *options_of(data), *given, "--output", str(tmp_path / "found.json")]) == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("evaluate")]
    assert words in line and not (tmp_path / "found.json").exists()


def test_box_score_without_grounding_is_named_as_unused(tmp_path: Path) -> None:
    options = evaluate.parse(["run", "--data", "x.tar", "--box-score", "root"])
    given = Evaluation(Scorer(Oracle(small_config(tmp_path)), Words(), small_config(tmp_path)), Reader(None))
    assert evaluate.unused(options, {}, given) == ["--box-score root: --task grounding is not measured"]


def test_sycoca_has_no_maps(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    run = pretrained(tmp_path, method="sycoca")
    assert evaluate.main([str(run), *options_of(write_files(tmp_path))]) == 1
    assert "evaluate: --task: grounding is for softmask_pp, got sycoca" in capfd.readouterr().err


def test_paths_between_commas(tmp_path: Path) -> None:
    names = [write_json(tmp_path / name, []) for name in ("a.json", "b.json", "c,d.json")]
    a, b, odd = names
    assert paths_of(f"{a},{b}") == [a, b] and paths_of(odd) == [odd] and paths_of(names) == names
    assert paths_of(f"{tmp_path}/{{a,b}}.json,{a}") == [a, b, a]
    with pytest.raises(DataError, match="no data"):
        paths_of(f"{a},")
