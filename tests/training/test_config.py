"""The configuration: what is accepted, and errors that name the key."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from softmask.training.config import Config, ConfigError, OptimizerConfig, flatten, load_config, save_config
from softmask.training.deepspeed_section import OWNED_DEEPSPEED_KEYS
from tests.support.train_fixtures import make_config


@pytest.fixture
def write(tmp_path):
    def write(text: str):
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


MINIMAL = "output: somewhere\ntrain: {steps: 10}\n"


def test_defaults(write) -> None:
    config = load_config(write(MINIMAL))
    assert config.optimizer == OptimizerConfig(lr=1e-4, min_lr=1e-5, warmup_steps=2000, weight_decay=0.02)
    assert config.train.precision == "fp32" and config.zero_stage == 0
    assert config.model.alpha == 0.4 and config.data.max_length == 25


def test_values_are_converted(write) -> None:
    text = MINIMAL + "optimizer: {lr: 1e-3, min_lr: 0, betas: [0.9, 0.98], eps: 1e-6}\ndata: {crop_scale: [0.5, 1]}\n"
    config = load_config(write(text))
    assert (config.optimizer.lr, config.optimizer.min_lr, config.optimizer.eps) == (1e-3, 0.0, 1e-6)
    assert config.optimizer.betas == (0.9, 0.98) and config.data.crop_scale == (0.5, 1.0)
    assert type(config.optimizer.min_lr) is float and type(config.data.crop_scale[1]) is float


def test_overrides(write) -> None:
    overrides = ["train.steps=5", "model.text.dropout=0", "optimizer.lr=5e-4", "data.train=a=b.tar", "data.flip=false"]
    overrides += ["deepspeed.zero_optimization.stage=2", "optimizer.betas=[0.8, 0.9]"]
    config = load_config(write(MINIMAL), overrides)
    assert config.train.steps == 5 and config.model.text.dropout == 0.0 and config.optimizer.lr == 5e-4
    assert config.data.train == "a=b.tar" and config.data.flip is False
    assert config.zero_stage == 2 and config.optimizer.betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.stpes=5", ["train.stpes", "unknown key", "train.steps"]),
        ("modell.alpha=1", ["modell", "unknown key", "model"]),
        ("model.vision.zzz=1", ["model.vision.zzz", "unknown key", "image_size"]),
        ("train.steps=many", ["train.steps", "expected int", "str 'many'"]),
        ("train.steps=1.5", ["train.steps", "expected int", "float 1.5"]),
        ("train.steps=true", ["train.steps", "expected int", "bool True"]),
        ("optimizer.lr=fast", ["optimizer.lr", "expected a finite float", "str 'fast'"]),
        ("optimizer.lr=", ["optimizer.lr", "expected a finite float", "str ''"]),
        ("optimizer.lr=[1]", ["optimizer.lr", "expected float", "list [1]"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas", "list of 2", "[0.9]"]),
        ("optimizer.betas=[0.9, x]", ["optimizer.betas[1]", "expected a finite float", "str 'x'"]),
        ("optimizer.lr_scales={vision: fast}", ["optimizer.lr_scales.vision", "expected a finite float", "str 'fast'"]),
        ("optimizer.lr_scales={vision: 0}", ["optimizer.lr_scales.vision", "> 0", "got 0.0"]),
        ("data.flip=1", ["data.flip", "expected bool", "int 1"]),
        ("model.vision=3", ["model.vision", "expected a mapping", "int 3"]),
        ("train.precision=fp8", ["train.precision", "fp32 or bf16 or fp16", "str 'fp8'"]),
        ("train.batch_size=1", ["train.batch_size", ">= 2", "got 1"]),
        ("train.epochs=2", ["train.steps", "either steps or epochs", "got 10 steps, 2 epochs"]),
        ("optimizer.min_lr=1", ["optimizer.min_lr", "0.0001", "got 1.0"]),
        ("data.max_length=1", ["data.max_length: expected at least 3, got 1"]),
        ("data.captions=one", ["data.captions: expected all or random, got str 'one'"]),
        ("data.eval_resize=no", ["data.eval_resize: expected auto or squash or crop, got"]),
        ("model.text.heads=7", ["model.text.width", "text.heads (7)", "got 768"]),
        ("data.image_size=64", ["data.image_size", "model.vision.image_size = 256", "got 64"]),
        ("seed=-1", ["seed", ">= 0", "got -1"]),
        ("output=", ["output", "the folder of the run"]),
        ("deepspeed.zero_optimization.stage=4", ["deepspeed.zero_optimization.stage", "0, 1, 2 or 3", "got 4"]),
        ("deepspeed.zero_optimization=2", ["deepspeed.zero_optimization", "expected a mapping", "got 2"]),
        ("deepspeed.zero_optimisation.stage=2", ["zero_optimisation", "did you mean deepspeed.zero_optimization?"]),
        ("deepspeed.flops_profiler.enabld=true", ["deepspeed.flops_profiler.enabld", "flops_profiler.enabled?"]),
        ("deepspeed.aio=3", ["deepspeed.aio: expected a mapping, got 3"]),
        ("train.steps", ["override", "key=value", "'train.steps'"]),
        ("seed.x=1", ["seed.x", "has no keys to override"]),
    ],
)
def test_bad_overrides_are_refused(write, override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(MINIMAL + "seed: 0\n"), [override])
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


@pytest.mark.parametrize("key", OWNED_DEEPSPEED_KEYS)
def test_deepspeed_keys_that_the_trainer_sets_are_refused(write, key: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"use {OWNED_DEEPSPEED_KEYS[key]} instead")):
        load_config(write(MINIMAL), [f"deepspeed.{key}=1"])


def test_deepspeed_section_from_a_file_beside_the_configuration(write, tmp_path) -> None:
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert load_config(write(MINIMAL + "deepspeed: zero.json\n")).zero_stage == 2
    with pytest.raises(ConfigError, match=r"deepspeed: cannot read .*none.json: No such file"):
        load_config(write(MINIMAL + "deepspeed: none.json\n"))


def test_installed_configurations_are_found_by_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("demo").output == load_config("demo.yaml").output == "runs/demo"
    Path("demo").write_text("output: mine\ntrain: {steps: 1}\n")
    assert load_config("demo").output == "mine"
    with pytest.raises(ConfigError, match="cannot read demo_3: No such file"):
        load_config("demo_3")
    with pytest.raises(ConfigError, match="cannot read configs/demo.yaml: No such file"):
        load_config("configs/demo.yaml")


def test_unreadable_files_are_refused(write, tmp_path) -> None:
    with pytest.raises(ConfigError, match="cannot read .*missing.yaml: No such file"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(write("a: [1\n"))
    with pytest.raises(ConfigError, match="expected keys and values"):
        load_config(write("- 1\n"))
    with pytest.raises(ConfigError, match="train: missing"):
        load_config(write("output: x\n"))


def test_numbers_in_exponent_notation_are_read(write, tmp_path) -> None:
    """YAML 1.1 reads 5e8 and 1e-4 as strings."""
    text = "output: x\ntrain: {steps: 1e3}\noptimizer: {lr: 5e-4, min_lr: 1.e-5}\ndeepspeed: {zero_optimization: %s}"
    for section in ("{stage: 2, reduce_bucket_size: 5e8}", '{"stage": 2, "reduce_bucket_size": 500_000_000}'):
        config = load_config(write(text % section))
        assert (config.train.steps, config.optimizer.lr, config.optimizer.min_lr) == (1000, 5e-4, 1e-5)
        assert config.deepspeed["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 5e8}
    (tmp_path / "zero.json").write_text('{\n\t"zero_optimization": {\n\t\t"stage": 1, "reduce_bucket_size": 5E+8}}')
    assert load_config(write(MINIMAL + "deepspeed: zero.json\n")).deepspeed["zero_optimization"]["stage"] == 1


def test_yaml_1_1_octal_binary_and_base_60_numbers_are_refused(write) -> None:
    for text in ("010", "1:30", "0b1", "08"):
        with pytest.raises(ConfigError, match=f"train.steps: expected int, got str '{text}'"):
            load_config(write(MINIMAL), [f"train.steps={text}"])


def test_data_may_be_a_list(write, tmp_path) -> None:
    config = load_config(write(MINIMAL), ["data.train=[a.tar, b-*.tar]"])
    assert config.data.train == ("a.tar", "b-*.tar")
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    with pytest.raises(ConfigError, match="data.train: expected str"):
        load_config(write(MINIMAL), ["data.train={a: b}"])


def test_duplicate_keys_are_refused(write, tmp_path) -> None:
    with pytest.raises(ConfigError, match="'train' is given twice.* line 3"):
        load_config(write(MINIMAL + "train: {steps: 20}\n"))
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 1, "stage": 2}}')
    with pytest.raises(ConfigError, match="zero.json is not JSON: the key 'stage' is given twice"):
        load_config(write(MINIMAL + "deepspeed: zero.json\n"))
    with pytest.raises(ConfigError, match=r"data.train: given twice, as 'a0.tar' and 'a1.tar'; the shell expands"):
        load_config(write(MINIMAL), ["data.train=a0.tar", "data.train=a1.tar"])


def test_home_directory_is_expanded(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/of/me")
    paths = ["output=~/run", "init=~/first", "data.tokenizer=~/words", "data.image_root=~/images"]
    config = load_config(write(MINIMAL), [*paths, "model.text.checkpoint=~/bert", "model.vision.checkpoint=~/vit"])
    assert (config.output, config.init, config.data.tokenizer) == ("/of/me/run", "/of/me/first", "/of/me/words")
    assert (config.model.text.checkpoint, config.model.vision.checkpoint) == ("/of/me/bert", "/of/me/vit")
    assert config.data.image_root == "/of/me/images"


def test_git_lfs_pointer_is_refused(write) -> None:
    with pytest.raises(ConfigError, match=r"config.yaml is a pointer of git-lfs, not the file: run git lfs pull"):
        load_config(write("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"))


def test_saved_configuration_loads_equal(tmp_path) -> None:
    config = make_config(
        tmp_path, "deepspeed.zero_optimization.stage=1", "optimizer.eps=1e-10", "optimizer.lr_scales={a.b: 2}"
    )
    config = dataclasses.replace(config, init="'5e8'")
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    config = dataclasses.replace(config, init="5e8")
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_json_files_are_read(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"output": "x", "train": {"epochs": 2}}))
    assert load_config(path).train.epochs == 2.0


def test_flatten_names_every_leaf(write) -> None:
    leaves = flatten(load_config(write(MINIMAL)))
    assert leaves["model.vision.conv_vit.patch_size"] == 8 and leaves["optimizer.betas"] == (0.9, 0.999)
    assert not any(dataclasses.is_dataclass(value) for value in leaves.values())
    assert {key.split(".")[0] for key in leaves} == {item.name for item in dataclasses.fields(Config)}
