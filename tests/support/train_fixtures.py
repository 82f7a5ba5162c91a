"""A small training run: its data and configuration, how to start it, and how to read its state."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from softmask.training.checkpoint.store import find_checkpoint
from softmask.training.config import Config, load_config, save_config
from softmask.training.run_folder import prepare_run
from softmask.training.trainer import Trainer, train

_numbers = itertools.count(os.getpid() % 500)
ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = ROOT / "train" / "pretrain.py"
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (30, 60, 220), "white": (250, 250, 250)}
# DeepSpeed's start-up sets these in this process; a child must set its own.
DISTRIBUTED = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CROSS_RANK",
    "CROSS_SIZE",
)

YAML = """
output: {output}
seed: 3
train: {{steps: 6, batch_size: 8, checkpoint_every: 0, log_every: 1}}
optimizer: {{lr: 1e-3, min_lr: 1e-4, warmup_steps: 2}}
model:
  vision: {{name: conv_vit, image_size: 32, conv_vit: {{patch_size: 8, width: 32, depth: 2, heads: 2, stem_width: 8}}}}
  text: {{width: 32, heads: 2, intermediate_size: 64, text_layers: 1, fusion_layers: 2, max_positions: 32}}
  embed_dim: 16
  queue_size: 32
  cam_layer: 0
  alpha_warmup_steps: 4
data: {{train: {data}, image_size: 32, vocab_size: 64, max_length: 16}}
"""

SYCOCA_YAML = """
output: {output}
seed: 3
method: sycoca
train: {{steps: 4, batch_size: 8, checkpoint_every: 0, log_every: 1, clip_grad: 1.0}}
optimizer: {{lr: 1e-3, min_lr: 1e-4, warmup_steps: 2}}
model:
  vision: {{name: conv_vit, image_size: 32, conv_vit: {{patch_size: 8, width: 32, depth: 2, heads: 2, stem_width: 8}}}}
  text: {{width: 32, heads: 2, layers: 1, decoder_layers: 1, max_positions: 16}}
  embed_dim: 16
  image_decoder_layers: 1
  image_decoder_heads: 2
data: {{train: {data}, image_size: 32, vocab_size: 64, max_length: 16}}
"""


def write_shard(path: Path, *, count: int = 64, broken: tuple[int, ...] = ()) -> Path:
    """Write a tar shard of `count` two-coloured images; those in `broken` cannot be decoded."""
    rng = random.Random(0)
    with tarfile.open(path, "w") as shard:
        for number in range(count):
            one, two = rng.sample(sorted(COLOURS), 2)
            image = Image.new("RGB", (32, 32), COLOURS[one])
            image.paste(COLOURS[two], (rng.randrange(20), rng.randrange(20), 30, 30))
            encoded = io.BytesIO()
            image.save(encoded, "PNG")
            pixels = b"no image" if number in broken else encoded.getvalue()
            _add(shard, f"{number:06d}.png", pixels)
            _add(shard, f"{number:06d}.txt", f"a {two} box on {one} paper".encode())
    return path


def _add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))


def make_config(folder: Path, *overrides: str, data: Path | None = None) -> Config:
    """Configuration of a run in `folder`/run on the data of `folder`, which is written if it is missing."""
    data = data or folder / "train.tar"
    return _write_config(YAML, folder / "base.yaml", overrides, output=folder / "run", data=data)


def make_sycoca_config(folder: Path, name: str, *overrides: str) -> Config:
    """SyCoCa's configuration of a run in `folder`/`name` on the data of `folder`, written to `folder`/`name`.yaml."""
    data = folder / "train.tar"
    return _write_config(SYCOCA_YAML, folder / f"{name}.yaml", overrides, output=folder / name, data=data)


def _write_config(template: str, path: Path, overrides: tuple[str, ...], *, output: Path, data: Path) -> Config:
    if not data.exists():
        write_shard(data)
    path.write_text(template.format(output=output, data=data), encoding="utf-8")
    return load_config(path, overrides)


def make_trainer(config: Config) -> Trainer:
    """A trainer that has not run yet."""
    from softmask.data import open_source
    from softmask.training.engine.startup import start_distributed

    source = open_source(config.data.train)
    start_distributed()
    return Trainer(config, source, prepare_run(config, source, None))


def run_here(config: Config, *, checkpoint: Path | None = None) -> Trainer:
    return train(config, checkpoint=checkpoint)


def child_environment() -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key not in DISTRIBUTED}
    return environment | {"OMP_NUM_THREADS": str(torch.get_num_threads())}


def start_cli(config: Config, *arguments: str) -> subprocess.Popen:
    """`python train/pretrain.py` on the configuration."""
    path = Path(config.output).with_suffix(".yaml")
    save_config(config, path)
    command = [sys.executable, str(PRETRAIN), "--config", str(path), *arguments]
    return subprocess.Popen(
        command, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run_cli(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PRETRAIN), *arguments]
    return subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=240)


def launch(script: Path, *arguments: str) -> subprocess.Popen:
    """Start the `deepspeed` launcher with two ranks, in a process group of its own."""
    launcher = Path(sys.executable).with_name("deepspeed")
    port = 20000 + os.getpid() % 20000
    command = [str(launcher), "--num_accelerators", "2", "--master_port", str(port), str(script), *arguments]
    environment = child_environment() | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{launcher.parent}{os.pathsep}{environment['PATH']}"
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def run_on_two_ranks(script: Path, *arguments: str) -> None:
    """Run the script in two processes of one world, without the launcher, which is slow to start."""
    run_on_ranks(2, script, *arguments)


def run_on_ranks(count: int, script: Path, *arguments: str) -> list[str]:
    """Run the script in so many processes of one world. Returns what each has printed."""
    world = {"WORLD_SIZE": count, "LOCAL_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": own_port()}
    world |= {"OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu"}
    ranks = []
    for rank in range(count):
        settings = world | {"RANK": rank, "LOCAL_RANK": rank}
        environment = child_environment() | {name: str(value) for name, value in settings.items()}
        command = [sys.executable, str(script), *arguments]
        ranks.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    outputs = []
    try:
        for process in ranks:
            output, _ = process.communicate(timeout=400)
            assert process.returncode == 0, output
            outputs.append(output)
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    return outputs


def own_port() -> int:
    """A free port below those that the kernel gives out, and apart from other processes of pytest-xdist."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for number in _numbers:
        port = 20000 + 500 * (worker % 20) + number % 500
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("unreachable: the numbers never end")


def rows(run: str | Path, name: str = "log.jsonl") -> list[dict]:
    return [json.loads(line) for line in (Path(run) / name).read_text().splitlines()]


def assert_rows_close(logged: list[dict], expected: list[dict]) -> None:
    """Assert that logs are equal, except for times and the rounding of sums in another order."""
    for row, other in zip(logged, expected, strict=True):
        names = row.keys() - {"seconds", "samples_per_second"}
        assert {name: row[name] for name in names} == pytest.approx({name: other[name] for name in names}, rel=1e-5)


def saved_state(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint: weights, momentum encoder, queue and optimizer state of all ranks."""
    checkpoint = find_checkpoint(path)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.glob("*.pt")):
        _collect(torch.load(file, weights_only=False), file.name, tensors)
    return tensors


def _collect(node: object, name: str, tensors: dict[str, torch.Tensor]) -> None:
    if isinstance(node, torch.Tensor):
        tensors[name] = node
    elif isinstance(node, dict):
        for key, value in node.items():
            _collect(value, f"{name}/{key}", tensors)
    elif isinstance(node, (list, tuple)):
        for number, value in enumerate(node):
            _collect(value, f"{name}/{number}", tensors)


def different(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that differ in any bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def weights(trainer, *, momentum_encoder: bool = True) -> dict[str, torch.Tensor]:
    from deepspeed import zero

    with zero.GatheredParameters(list(trainer.model.parameters())):  # does nothing below stage 3
        state = trainer.model.state_dict()
        return {
            name: tensor.clone()
            for name, tensor in state.items()
            if momentum_encoder or not name.startswith("momentum_encoder.")
        }


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
