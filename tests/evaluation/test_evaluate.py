"""Evaluation of an oracle with known results, and of a tiny model by the command line."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from softmask.data import open_source, rle
from softmask.evaluation import command, evaluate, retrieval, sections
from softmask.evaluation.gallery import build_gallery
from softmask.evaluation.grounding import PointingGame, phrases
from softmask.evaluation.one_pass import measure_one
from softmask.evaluation.readers import Reader, Scorer
from softmask.evaluation.retrieval import Recalls
from tests.support.data_files import write_tar
from tests.support.evaluation_files import (
    PAIRS,
    Oracle,
    Words,
    scene,
    small_config,
    write_plain,
    write_run,
    write_scenes,
)

ROOT = Path(__file__).resolve().parents[2]
PERFECT = {"r1": 1.0, "r5": 1.0, "r10": 1.0}
LOST = {"r1": 0.0, "r5": 0.0, "r10": 0.0}


def make_scorer(tmp_path, *, batch_size=5, max_length=16, **options) -> Scorer:
    config = small_config(tmp_path)
    config.data.max_length = max_length
    return Scorer(Oracle(config, **options), Words(), config, batch_size=batch_size)


def all_sections(scorer: Scorer, reader: Reader, **options) -> dict:
    return sections.evaluate(sections.Evaluation(scorer, reader, **options), sections.sections_of(scorer))


def pointing(scorer: Scorer, reader: Reader) -> dict:
    return measure_one(scorer, reader, PointingGame(scorer))


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_oracle_scores_perfectly_and_its_attention_misses(tmp_path, batch_size):
    reader = Reader(open_source(write_scenes(tmp_path / "test.tar")))
    result = all_sections(make_scorer(tmp_path, batch_size=batch_size), reader, pairs=0, rerank=4)
    section = result["retrieval"]
    assert (section["samples"], section["images"], section["rerank"]) == (12, 12, 4)
    for stage in ("itc", "itm"):
        assert section[stage] == {"i2t": PERFECT, "t2i": PERFECT}
    assert section["chance"]["i2t"]["r1"] == pytest.approx(1 / 12)
    expected = {"pointing": 1.0, "attention": 0.0, "random": 128 / 1024}
    assert result["grounding"] == expected | {"words": 24, "samples": 12, "truncated": 0, "hidden": 0}


@pytest.mark.parametrize("rerank", [4, 12, 99])
def test_itm_reranks_the_candidates_of_uninformative_features(tmp_path, rerank):
    """All first-stage scores are equal, so the candidates are the first `rerank` items: only their queries win."""
    scorer = make_scorer(tmp_path, blind=True)
    reader = Reader(open_source(write_scenes(tmp_path / "test.tar")))
    section = measure_one(scorer, reader, Recalls(scorer, rerank=rerank))
    assert section["itc"] == {"i2t": LOST, "t2i": LOST}
    share = min(rerank, 12) / 12
    assert section["itm"]["i2t"]["r1"] == section["itm"]["t2i"]["r1"] == share
    first = min(rerank, 12)
    assert (
        sum(scorer.model.passes) == 144 - (12 - first) ** 2
    )  # each pair that is a candidate in either direction, once


@pytest.mark.parametrize("image_root", ["", "images"])
def test_captions_of_one_image_share_its_encoding(tmp_path, image_root):
    """With a JSON list whose images are beside it or in the image_root of training."""
    images = tmp_path / image_root
    images.mkdir(exist_ok=True)
    for number in range(12):
        (images / f"{number}.png").write_bytes(scene(number)[0][1])
    captions = [[f"a {a} box beside a {b} one", f"a {a} one beside a {b} box"] for a, b in PAIRS]
    entries = [{"image": f"{number}.png", "caption": texts} for number, texts in enumerate(captions)]
    (tmp_path / "list.json").write_text(json.dumps(entries), encoding="utf-8")
    scorer = make_scorer(tmp_path)
    scorer.config.data.image_root = image_root and str(images)
    reader = command.open_reader(scorer, str(tmp_path / "list.json"))
    result = all_sections(scorer, reader, pairs=0, rerank=3)
    assert (result["retrieval"]["samples"], result["retrieval"]["images"]) == (24, 12)
    assert result["retrieval"]["itc"] == {"i2t": PERFECT, "t2i": PERFECT}
    assert result["retrieval"]["itm"] == {"i2t": PERFECT, "t2i": PERFECT}
    assert result["retrieval"]["chance"]["i2t"]["r1"] == pytest.approx(2 / 24)
    assert "grounding" not in result


def test_pairs_limits_retrieval_but_not_grounding(tmp_path):
    reader = Reader(open_source(write_scenes(tmp_path / "test.tar", broken=(1, 11))))
    result = all_sections(make_scorer(tmp_path), reader, pairs=4, rerank=2)
    assert result["retrieval"]["samples"] == 4  # scene 1 is broken: 0, 2, 3 and 4
    assert (result["grounding"]["samples"], result["grounding"]["words"]) == (10, 20)
    assert sorted(reader.skipped) == [1, 11]
    assert reader.skipped[11].startswith("test.tar:0011: image cannot be decoded")


def test_truncated_phrases_and_hidden_objects_are_counted_not_scored(tmp_path):
    members = scene(0)
    content = json.loads(members[2][1])
    content["objects"][0]["mask"]["counts"] = [1024]
    write_tar(tmp_path / "test.tar", [*members[:2], (members[2][0], json.dumps(content).encode()), *scene(1)])
    reader = Reader(open_source(str(tmp_path / "test.tar")))
    result = pointing(make_scorer(tmp_path), reader)
    assert {key: result[key] for key in ("words", "samples", "truncated", "hidden")} == {
        "words": 3,
        "samples": 2,
        "truncated": 0,
        "hidden": 1,
    }
    # [CLS] a red box beside a green [SEP]: "green one" lost its end
    result = pointing(make_scorer(tmp_path, max_length=8), reader)
    assert (result["words"], result["truncated"], result["hidden"], result["pointing"]) == (1, 2, 1, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.update(span=[3, 10]), r"objects\[1\]: span \[3, 10\].*expected the phrase 'green one'"),
        (lambda entry: entry.update(span=[3, None]), r"objects\[1\]: expected .*span \[3, None\] of a caption"),
        (lambda entry: entry.update(span=[-9, 10]), r"objects\[1\]: expected .*span \[-9, 10\] of a caption"),
        (lambda entry: entry.pop("mask"), r"objects\[1\]: expected phrase, span .* KeyError: 'mask'"),
        (lambda entry: entry["mask"].update(counts=[5]), r"objects\[1\]: expected .*1024"),
        (lambda entry: entry["mask"].update(counts=[2**70]), r"expected .*a run is too long"),
        (
            lambda entry: entry["mask"].update(size=[2**20, 2**14], counts=[2**34]),
            r"mask size \[1048576, 16384\], exp",
        ),
        (lambda entry: entry["mask"].update(size=[16, 64]), r"mask size \[16, 64\], expected the image's \[32, 32\]"),
    ],
)
def test_malformed_objects_are_named_with_sample_and_entry(tmp_path, change, message):
    members = scene(0)
    content = json.loads(members[2][1])
    change(content["objects"][1])
    write_tar(tmp_path / "test.tar", [*members[:2], (members[2][0], json.dumps(content).encode())])
    (sample,) = Reader(open_source(str(tmp_path / "test.tar"))).all()
    words = phrases(sample, Words()([sample.caption], max_length=16).offsets[0])
    ((where, reason),) = sample.bad_objects.items()
    assert len(words) == 1 and re.match(f"test.tar:0000: .*{message}", f"{where}: {reason}")


def wide(number: int, *, shift: int) -> list[tuple[str, bytes]]:
    """Scene `number`, `shift` pixels from the left in a white image of twice its width."""
    (name, data), text, (json_name, meta) = scene(number)
    image = Image.new("RGB", (64, 32), "white")
    image.paste(Image.open(io.BytesIO(data)), (shift, 0))
    file = io.BytesIO()
    image.save(file, "PNG")
    content = json.loads(meta)
    for entry in content["objects"]:
        mask = np.zeros((32, 64), bool)
        mask[:, shift : shift + 32] = rle.decode(entry["mask"])
        entry["mask"] = rle.encode(mask)
    return [(name, file.getvalue()), text, (json_name, json.dumps(content).encode())]


def test_masks_are_cropped_like_images(tmp_path):
    """A wide image, cropped to its middle, is the scene; an object at the side is hidden."""
    write_tar(tmp_path / "test.tar", [member for number in range(12) for member in wide(number, shift=16)])
    write_tar(tmp_path / "aside.tar", wide(0, shift=0))
    scorer = make_scorer(tmp_path)
    scorer.config.data.eval_resize = "crop"
    reader = Reader(open_source(str(tmp_path / "test.tar")), scorer.config.data)
    assert measure_one(scorer, reader, Recalls(scorer, rerank=4))["itc"]["i2t"] == PERFECT
    result = pointing(scorer, reader)
    assert (result["pointing"], result["words"], result["hidden"]) == (1.0, 24, 0)
    assert result["random"] == pytest.approx(128 / 1024)
    sample = next(reader.all())
    assert sample.seen.size == (32, 32) and sample.image.size == (64, 32)
    result = pointing(scorer, Reader(open_source(str(tmp_path / "aside.tar")), scorer.config.data))
    assert (result["words"], result["hidden"]) == (1, 1)  # the left box lies outside, half of the right one inside


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    return write_run(folder, write_scenes(folder / "test.tar"))


def test_command_line_writes_the_documented_structure(run, capsys):
    data = str(run.parent / "test.tar")
    assert evaluate.main([str(run), "--data", data, "--pairs", "10", "--rerank", "4", "--batch-size", "5"]) == 0
    result = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert list(result) == ["retrieval", "grounding", "training", "evaluation"]
    for stage in ("itc", "itm", "chance"):
        for way in ("i2t", "t2i"):
            values = list(result["retrieval"][stage][way].values())
            assert list(result["retrieval"][stage][way]) == ["r1", "r5", "r10"]
            assert values == sorted(values) and values[0] >= 0 and values[2] <= 1
    assert result["retrieval"]["samples"] == 10
    assert result["grounding"]["words"] == 24
    assert result["training"] == {"seconds": 2.5, "steps": 5}
    facts = result["evaluation"]
    assert facts["data"] == data and facts["digest"] == open_source(data).digest
    read = {"checkpoint": "step_00000005", "text_length": 16, "image_size": 32, "resize": "squash"}
    assert read.items() <= facts.items()
    assert (result["retrieval"]["cut"], result["retrieval"]["rerank_by"]) == (0, "match")
    assert "pointing game with 24 phrases" in capsys.readouterr().out
    assert not list(run.glob(".*.part"))


def test_results_of_the_real_model_do_not_depend_on_the_batch_size(run):
    """In double precision, so that no order depends on rounding."""
    scorer = command.load_scorer(run / "checkpoints" / "step_00000005", batch_size=3)
    scorer.model.double()
    encode = scorer.model.encode_image
    scorer.model.encode_image = lambda images: encode(images.double())
    reader = Reader(open_source(str(run.parent / "test.tar")))
    wanted = torch.rand(12, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    scores = []
    for size in (3, 64):
        scorer.batch_size = size
        gallery = build_gallery(scorer, reader)
        scores.append(retrieval.match_scores(scorer, gallery, wanted))
        image = gallery.pieces[2 // size].tokens[2 % size]
        keys = scorer.model.image_keys(image[None])
        single = scorer.model.match(
            keys, gallery.text_tokens[5:6], gallery.attention_mask[5:6], kv_index=torch.tensor([0])
        )
    assert torch.equal(scores[0].isnan(), ~wanted)
    rounding = torch.finfo(torch.float32).eps * scores[0][wanted].abs().max()
    assert (scores[0][wanted] - scores[1][wanted]).abs().max() <= rounding
    everything = retrieval.match_scores(scorer, gallery, torch.ones(12, 12, dtype=torch.bool))
    assert (everything[2, 5] - single[0, 1]).abs() <= rounding
    difference = retrieval.match_scores(scorer, gallery, wanted, by="difference")
    no_match = scores[1] - difference
    assert wanted[2, 5] and (no_match[2, 5] - single[0, 0]).abs() <= 2 * rounding
    both = retrieval.match_scores(scorer, gallery, wanted, by="match+itc")
    assert (both - (scores[1] + gallery.similarity))[wanted].abs().max() <= 2 * rounding


def test_errors_are_one_line_and_keep_the_old_file(run, tmp_path, capsys):
    data = str(run.parent / "test.tar")
    output = tmp_path / "metrics.json"
    output.write_text("old", encoding="utf-8")
    unreadable = write_scenes(tmp_path / "unreadable.tar", (0, 1), broken=(0, 1))
    cases = {
        (str(tmp_path / "nowhere"), data): "nowhere: expected a step_... checkpoint",
        (str(run), str(tmp_path / "no-*.tar")): "no file matches",
        (str(run), unreadable): "no readable sample",
    }
    for (checkpoint, shards), message in cases.items():
        assert evaluate.main([checkpoint, "--data", shards, "--output", str(output)]) == 1
        error = capsys.readouterr().err
        named, last = error.splitlines()[:-1], error.splitlines()[-1]
        assert message in last
        assert len(named) == (2 if shards == unreadable else 0)
    assert output.read_text(encoding="utf-8") == "old"
    assert evaluate.main([str(run), "--data", data, "--output", str(tmp_path / "no" / "metrics.json")]) == 1
    assert "--output: no folder" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "unreadable.tar"}


def test_unreadable_samples_are_named_on_stderr(run, tmp_path, capsys):
    data = write_scenes(tmp_path / "test.tar", broken=(3,))
    assert evaluate.main([str(run), "--data", data, "--output", str(tmp_path / "metrics.json")]) == 0
    assert capsys.readouterr().err.startswith("left out: test.tar:0003: image cannot be decoded")
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["retrieval"]["samples"] == 11


@pytest.mark.parametrize("objects", [[{"phrase": "red box"}], [3], "red box", {"phrase": "red box"}])
def test_unusable_objects_are_skipped(run, tmp_path, capsys, objects):
    broken = json.loads(scene(0)[2][1]) | {"objects": objects}
    members = [*scene(0)[:2], ("0000.json", json.dumps(broken).encode()), *scene(1)]
    data = str(write_tar(tmp_path / "test.tar", members))
    assert evaluate.main([str(run), "--data", data, "--output", str(tmp_path / "metrics.json")]) == 0
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert result["retrieval"]["samples"] == 2 and result["grounding"]["samples"] == 1
    expected = "left out: 1 unusable objects, the first: test.tar:0000: objects"
    assert expected in capsys.readouterr().err


def test_json_list_with_image_root_and_other_sizes(run, tmp_path, capsys):
    """Images in another folder, larger images and shorter captions than in training."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(scene(number)[0][1])
    entries = [{"image": f"{number}.png", "caption": f"a red box number {number}"} for number in range(3)]
    (tmp_path / "list.json").write_text(json.dumps(entries), encoding="utf-8")
    command = [str(run), "--data", str(tmp_path / "list.json"), "--output", str(tmp_path / "metrics.json")]
    assert evaluate.main(command) == 1 and "no readable sample" in capsys.readouterr().err
    sizes = ["--image-root", str(folder), "--image-size", "64", "--text-length", "5"]
    assert evaluate.main([*command, *sizes]) == 0
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert result["retrieval"]["samples"] == result["retrieval"]["cut"] == 3
    assert "3 captions were truncated to 5 tokens" in capsys.readouterr().out
    for wrong, expected in (
        ("--text-length=2000", "--text-length: expected 3 to"),
        ("--image-size=33", "vision.image_size"),
    ):
        capsys.readouterr()
        assert evaluate.main([*command, wrong]) == 1
        error = capsys.readouterr().err
        assert expected in error and len(error.splitlines()) == 1


def test_output_replaces_only_json_files(run, tmp_path, capsys):
    data = write_scenes(tmp_path / "test.tar")
    before = (tmp_path / "test.tar").read_bytes()
    for output in (data, "/dev/null"):
        assert evaluate.main([str(run), "--data", data, "--output", output]) == 1
        assert f"--output: {output!r} exists and is not a .json file; choose another name" in capsys.readouterr().err
    assert (tmp_path / "test.tar").read_bytes() == before
    (tmp_path / "target.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "target.json")
    assert evaluate.main([str(run), "--data", data, "--output", str(tmp_path / "link.json")]) == 0
    assert (tmp_path / "link.json").is_symlink() and "retrieval" in (tmp_path / "target.json").read_text()


def test_captions_of_unknown_words_are_refused(run, tmp_path, capsys):
    data = write_plain(tmp_path / "plain.tar", ["一只红色的盒子", "一个绿色的盒子"])
    assert evaluate.main([str(run), "--data", data, "--output", str(tmp_path / "metrics.json")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "of the tokens in the first 2 captions are [UNK]" in line


def test_options_without_effect_are_reported(run, tmp_path, capsys):
    data = write_scenes(tmp_path / "test.tar")
    (tmp_path / "classes.json").write_text('[{"name": "owl", "phrase": "an owl"}]')
    command = [str(run), "--data", data, "--output", str(tmp_path / "metrics.json"), "--training", data]
    assert evaluate.main([*command, "--classes", str(tmp_path / "classes.json")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in lines if line.startswith("not used: ")] == [" --training", " --classes"]
    for wrong in ("--pairs", "--batch-size"):
        with pytest.raises(SystemExit):
            evaluate.main([*command, wrong, "100000000000000000000"])


def test_missing_methods_of_a_model_are_named(tmp_path):
    scorer = make_scorer(tmp_path)
    assert scorer.matcher is scorer.word_mapper is scorer.model
    with pytest.raises(TypeError, match="Oracle lacks patch_size, hidden_patches and reconstruct"):
        _ = scorer.reconstructor
    scorer.model = object()
    with pytest.raises(TypeError, match="object lacks word_maps"):
        _ = scorer.word_mapper


def test_captions_without_objects_have_no_grounding(run, tmp_path, capsys):
    data = write_plain(tmp_path / "plain.tar", ["a red box", "a green box"])
    assert evaluate.main([str(run), "--data", data, "--output", str(tmp_path / "metrics.json")]) == 0
    assert list(json.loads((tmp_path / "metrics.json").read_text())) == ["retrieval", "training", "evaluation"]
    assert "pointing" not in capsys.readouterr().out


def test_closed_stdout_is_not_an_error(run, tmp_path):
    command = [sys.executable, "train/evaluate.py", str(run), "--data", str(run.parent / "test.tar"), "--output"]
    process = subprocess.Popen(
        [*command, str(tmp_path / "metrics.json")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    process.stdout.close()
    assert "Traceback" not in process.stderr.read() and process.wait() == 0
