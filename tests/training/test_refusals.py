"""Wrong configuration keys, paths and environment variables: one line that names them, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from softmask.training import pretrain
from softmask.training.config import ConfigError, flatten, load_config
from softmask.training.launchers import LAUNCHERS, rank_variables
from tests.support.data_files import make_image
from tests.support.train_fixtures import DISTRIBUTED, PRETRAIN, SYCOCA_YAML, YAML, make_config, make_sycoca_config

WRONG = ("", "x", "-1", "1e999", ".nan", "true", "[]", "[x]", "{}", "{a: 1}", "2020-01-01", "'", "~", "0")
TEMPLATES = {"softmask_pp": YAML, "sycoca": SYCOCA_YAML}


def keys(method: str) -> list[str]:
    text = TEMPLATES[method].format(output="o", data="d")
    return sorted(flatten(_loaded(text, [])))


def _loaded(text: str, overrides: list[str]):
    path = Path(os.environ["XDG_CACHE_HOME"]) / "refusals.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


@pytest.mark.parametrize("method", TEMPLATES)
def test_wrong_values_of_every_key_are_accepted_or_refused_by_name(method: str) -> None:
    text, refused = TEMPLATES[method].format(output="o", data="d"), 0
    for key in keys(method):
        for value in WRONG:
            try:
                _loaded(text, [f"{key}={value}"])
            except ConfigError as error:
                refused += 1
                message, section = str(error), key.rpartition(".")[0]
                assert "\n" not in message and (
                    key in message or (section and section in message) or "model" in message
                ), (
                    key,
                    message,
                )
    assert refused > 5 * len(keys(method))


@pytest.mark.parametrize("method", TEMPLATES)
def test_section_that_is_not_a_mapping_is_refused_by_name(method: str) -> None:
    tree = yaml.safe_load(TEMPLATES[method].format(output="o", data="d"))
    for key in {name.partition(".")[0] for name in keys(method)} | {"model.vision", "model.text"}:
        for value in ("3", "x", "[1]"):
            if key in ("output", "seed", "method", "init") or (key == "deepspeed" and value == "x"):
                continue
            with pytest.raises(ConfigError, match=key.replace(".", r"\.")) as error:
                _loaded(yaml.safe_dump(tree), [f"{key}={value}"])
            assert "\n" not in str(error.value)


PATHS = ("output", "init", "data.train", "data.tokenizer", "data.image_root", "model.vision.checkpoint", "deepspeed")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Places a path may lead to: nothing, a folder, files of other kinds."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "folder").mkdir()
    (folder / "empty").touch()
    (folder / "bytes").write_bytes(bytes(range(256)) * 8)
    (folder / "image.png").write_bytes(make_image(0))
    (folder / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "a.json").write_text("{}")
    return {name: str(folder / name) for name in ("nowhere/x", *(path.name for path in folder.iterdir()))}


@pytest.mark.parametrize("key", PATHS)
def test_wrong_paths_are_refused_in_one_line(
    key: str, places: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    options = ["train.steps=1"]
    if key == "model.vision.checkpoint":
        options += ["model.vision.name=vit_tiny_patch16_224", "train.batch_size=4"]
    config = make_config(tmp_path, *options)
    entries = tmp_path / "list.json"
    entries.write_text('[{"image": "a.png", "caption": "one"}]' if key == "data.image_root" else "[]")
    for name, place in places.items():
        run = tmp_path / name.replace("/", "-")
        overrides = [*options, f"output={run}", f"{key}={place}"]
        if key == "output":
            if name in ("nowhere/x", "folder"):  # good places for a run
                continue
            overrides.remove(f"output={run}")
        if key == "data.image_root":
            overrides.append(f"data.train={entries}")
        if key == "deepspeed" and name == "a.json":
            continue  # a section without keys
        capfd.readouterr()
        assert pretrain.main(["--config", str(tmp_path / "base.yaml"), *overrides]) == 2, (key, name)
        lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith(("run ", "skipped"))]
        assert lines[-1].startswith("error: ") and not any("Traceback" in line for line in lines), (key, name, lines)
    assert config.output == str(tmp_path / "run")


def test_unusable_configuration_file_is_refused_in_one_line(
    places: dict[str, str], capfd: pytest.CaptureFixture
) -> None:
    for name, place in places.items():
        capfd.readouterr()
        assert pretrain.main(["--config", place]) == 2, name
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("error: ") and ("configuration" in line or "missing" in line), (name, line)


@pytest.mark.parametrize("resume", ["nowhere", "folder", "a.json", "loop"])
def test_path_without_a_checkpoint_is_refused_in_one_line(
    resume: str, places: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    make_sycoca_config(tmp_path, "run")
    place = places.get(resume, "nowhere")
    assert pretrain.main(["--config", str(tmp_path / "run.yaml"), "--resume", place]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {place}: expected a step_... checkpoint")


def test_wrong_values_of_every_launcher_variable_are_refused_by_name() -> None:
    for launcher in LAUNCHERS:
        good = {launcher.rank[0]: "1", launcher.world_size[0]: "2", launcher.local_rank[0]: "1"}
        good |= {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
        assert rank_variables(good)["RANK"] == "1"
        for name in good.keys() - {"MASTER_ADDR"}:
            for value in ("x", "-1", "1.5", "1 2", "²"):
                with pytest.raises(ConfigError, match=f"environment: .*{name}") as error:
                    rank_variables(good | {name: value})
                assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        pytest.param(
            "SOFTMASK_BACKEND", "fast", "environment: SOFTMASK_BACKEND: expected one of 'auto'", marks=pytest.mark.slow
        ),
        ("SOFTMASK_BACKEND", "cuda", "backend 'cuda' cannot run"),
        ("DS_ACCELERATOR", "tpu", "environment: DS_ACCELERATOR: expected cpu"),
    ],
)
def test_wrong_environment_variable_is_refused_in_one_line(
    tmp_path: Path, variable: str, value: str, message: str
) -> None:
    """From the command line, in a fresh process."""
    make_config(tmp_path, "train.steps=1")
    environment = {name: text for name, text in os.environ.items() if name not in DISTRIBUTED} | {variable: value}
    if variable != "DS_ACCELERATOR":
        environment.pop("DS_ACCELERATOR", None)
    command = [sys.executable, str(PRETRAIN), "--config", str(tmp_path / "base.yaml"), "train.steps=1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {message}"), done.stderr


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("WORLD_SIZE", "two", "WORLD_SIZE: expected a number"),
        ("RANK", "0", "RANK is set without WORLD_SIZE"),
        ("SLURM_PROCID", "3", "SLURM_PROCID is set without SLURM_STEP_NUM_TASKS"),
    ],
)
def test_wrong_launcher_variable_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd, variable: str, value: str, message: str
) -> None:
    make_config(tmp_path, "train.steps=1")
    for name in DISTRIBUTED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    assert pretrain.main(["--config", str(tmp_path / "base.yaml"), "train.steps=1"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: environment: {message}")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{stge: 1}", "deepspeed.zero_optimization.stge: "),
        ("{stage: 1, reduce_bucket_size: many}", "deepspeed.zero_optimization.reduce_bucket_size: "),
        ("{stage: 2, offload_optimizer: {device: cpu, ratio: 0.5}}", "deepspeed"),
        ("{stage: 2, offload_optimizer: {device: cpu}}", "deepspeed.zero_optimization.offload_optimizer: "),
        ("{stage: 1, offload_optimizer: {device: disk}}", "deepspeed.zero_optimization.offload_optimizer.device: "),
    ],
)
def test_errors_of_deepspeed_are_one_line(tmp_path: Path, capfd, section: str, message: str) -> None:
    make_config(tmp_path, "train.steps=1")
    arguments = ["--config", str(tmp_path / "base.yaml"), "train.steps=1", f"deepspeed.zero_optimization={section}"]
    assert pretrain.main(arguments) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith(f"error: {message}")
