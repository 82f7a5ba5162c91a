"""Damaged or swapped files of a run are refused in one line that names the file and the problem."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from softmask.data import CaptionTokenizer, open_source, train_wordpiece
from softmask.training.checkpoint.state import CheckpointError, read_state
from softmask.training.checkpoint.store import check_no_debris, find_checkpoint
from softmask.training.config import Config, ConfigError
from softmask.training.pretrain import main
from softmask.training.run_folder import check_same_words, prepare_run
from softmask.training.trainer import train
from tests.support.train_fixtures import make_config, run_here

STATE = {"step": 2, "micro_batches": 2, "seconds": 1.5, "skipped_samples": 0, "nonfinite": 0, "world_size": 1}
MISSING = object()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = make_config(tmp_path_factory.mktemp("finished"), "train.steps=2")
    run_here(config)
    return config


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seconds", "long", "seconds: expected a number that is not negative, got 'long'"),
        ("step", "2", "step: expected a number that is not negative, got '2'"),
        ("step", -5, "step: expected a number that is not negative, got -5"),
        ("step", 1000, "step: expected that of the folder's name, got 1000"),
        ("step", True, "step: expected a number that is not negative, got True"),
        ("micro_batches", -1, "micro_batches: expected a number that is not negative, got -1"),
        ("world_size", "1", "world_size: expected a number that is not negative, got '1'"),
        ("world_size", 0, "world_size: expected a number that is not negative, got 0"),
        ("skipped_samples", MISSING, "lacks skipped_samples"),
        ("loss_scale", {}, "loss_scale: expected value, good_steps, got {}"),
        ("data", 3, "data: expected captions, pictures, digest, got 3"),
        ("data", {}, "data: expected captions, pictures, digest, got {}"),
    ],
)
def test_error_names_the_damaged_key_of_trainer_json(tmp_path: Path, key: str, value: object, message: str) -> None:
    folder = tmp_path / "step_00000002"
    folder.mkdir()
    state = {name: old for name, old in (STATE | {key: value}).items() if old is not MISSING}
    (folder / "trainer.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError) as error:
        read_state(folder)
    assert str(error.value).startswith(f"{folder / 'trainer.json'}: {message}")


def test_deeply_nested_trainer_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trainer.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_state(tmp_path)


def test_tokenizer_other_than_that_of_the_weights_is_refused(finished: Config, tmp_path: Path) -> None:
    """With vocabularies of equal size, no shape would differ."""
    checkpoint = find_checkpoint(finished.output)
    own = CaptionTokenizer.load(checkpoint / "tokenizer")
    check_same_words(own, checkpoint, finished)
    letters = [f"{a}{b} x" for a in "qrstuvw" for b in "ghijklm"]
    other = train_wordpiece(letters, tmp_path / "other", vocab_size=own.vocab_size)
    with pytest.raises(ValueError, match="tokenizer: its words are not those that the weights of .* were trained with"):
        check_same_words(other, checkpoint, finished)
    given = [f"init={finished.output}", f"output={tmp_path / 'new'}", f"data.tokenizer={tmp_path / 'other'}"]
    config = make_config(tmp_path, *given, data=Path(finished.data.train))
    with pytest.raises(ConfigError, match="data.tokenizer: its words are not those"):
        prepare_run(config, open_source(config.data.train), None)
    shutil.copytree(finished.output, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "tokenizer")
    shutil.copytree(tmp_path / "other", tmp_path / "copy" / "tokenizer")
    config = make_config(tmp_path, f"output={tmp_path / 'copy'}", "train.steps=4", data=Path(finished.data.train))
    with pytest.raises(ConfigError, match="data.tokenizer: its words are not those"):
        prepare_run(config, open_source(config.data.train), find_checkpoint(config.output))


def test_checkpoint_with_other_optimizer_groups_is_refused(finished: Config, tmp_path: Path) -> None:
    """As from a version that decayed other parameters: sizes may match while the parameters do not."""
    shutil.copytree(finished.output, tmp_path / "copy")
    path = find_checkpoint(tmp_path / "copy") / "trainer.json"
    state = json.loads(path.read_text())
    for groups in ("0" * 64, None):
        path.write_text(json.dumps(state | {"groups": groups}))
        config = make_config(tmp_path, f"output={tmp_path / 'copy'}", "train.steps=4", data=Path(finished.data.train))
        with pytest.raises(CheckpointError, match="its optimizer groups the parameters differently.*init="):
            train(config, checkpoint=find_checkpoint(config.output))


def test_incomplete_checkpoint_in_the_way_is_refused(tmp_path: Path) -> None:
    for step in (2, 4):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000002" / "trainer.json").write_text("{}")
    check_no_debris(tmp_path, 4)
    with pytest.raises(CheckpointError, match=r"step_00000004: an incomplete checkpoint .* is in the way: remove it"):
        check_no_debris(tmp_path, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output=a\0b", "output: the value"),
        ('output="\\uD800"', "output: expected a path"),
        ("seed=!!int ''", "seed: the value"),
        ("data.flip=!!bool abc", "data.flip: the value"),
    ],
)
def test_malformed_override_values_are_refused(
    tmp_path: Path, override: str, message: str, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "config.yaml").write_text(f"output: {tmp_path}/run\ntrain: {{steps: 1}}\n")
    assert main(["--config", str(tmp_path / "config.yaml"), override]) == 2
    (line,) = "".join(capfd.readouterr()).strip().splitlines()
    assert line.startswith(f"error: {message}")


def test_output_that_is_a_file_is_refused(finished: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = make_config(tmp_path, f"output={tmp_path / 'file'}", data=Path(finished.data.train))
    with pytest.raises(ConfigError, match="output: expected the folder of the run, got the file"):
        prepare_run(config, open_source(config.data.train), None)
