"""The trainer in this process: what a step does, what it skips, and what a run leaves behind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from deepspeed import zero

from softmask.data import DataError, Loader, open_source
from softmask.models import SoftMaskPP, SoftMaskPPConfig
from softmask.tasks.softmask_pp import SoftMaskPPTask, alpha_at
from softmask.training.checkpoint.store import CheckpointError, build_model, find_checkpoint, load_model
from softmask.training.config import Config, ConfigError, OptimizerConfig, save_config
from softmask.training.engine.loss_scale import GradientGuard
from softmask.training.engine.zero import deepspeed_config
from softmask.training.logs import cut_back
from softmask.training.optim import lr_factor, parameter_groups, seed_everything
from softmask.training.pretrain import choose_checkpoint, main
from softmask.training.run_folder import prepare_run
from softmask.training.trainer import TrainingError
from tests.support.train_fixtures import make_config, make_trainer, rows, run_here, saved_state, write_shard

ZERO = [0, 1, 2, 3]
pytestmark = pytest.mark.usefixtures("plain_linear")


def weights(trainer, *, twin: bool = True) -> dict[str, torch.Tensor]:
    with zero.GatheredParameters(list(trainer.model.parameters())):  # does nothing before stage 3
        state = trainer.model.state_dict()
        return {name: tensor.clone() for name, tensor in state.items() if twin or not name.startswith("twin.")}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def poison_loss(monkeypatch, broken) -> None:
    """Make the loss of the forward passes (counted from 0) for which `broken` is true NaN."""
    forward, count = SoftMaskPP.forward, iter(range(1 << 30))

    def poisoned(self, batch, **options):
        output = forward(self, batch, **options)
        if broken(next(count)):
            output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(SoftMaskPP, "forward", poisoned)


def poison_images(monkeypatch, broken) -> None:
    """Give some forward passes pictures that are NaN: everything computed from them is."""
    forward, count = SoftMaskPP.forward, iter(range(1 << 30))

    def poisoned(self, batch, **options):
        if broken(next(count)):
            batch = dataclasses.replace(batch, images=batch.images * float("nan"))
        return forward(self, batch, **options)

    monkeypatch.setattr(SoftMaskPP, "forward", poisoned)


def poison_gradients(monkeypatch, broken) -> None:
    """Make the gradients, but not the loss, of some forward passes infinite."""
    forward, count = SoftMaskPP.forward, iter(range(1 << 30))

    def poisoned(self, batch, **options):
        output = forward(self, batch, **options)
        if broken(next(count)):
            loss = output.loss
            loss.register_hook(lambda gradient: gradient * float("inf"))
            output.loss = loss * 1.0
        return output

    monkeypatch.setattr(SoftMaskPP, "forward", poisoned)


# -- schedules --------------------------------------------------------------------------------------------------------


def test_learning_rate() -> None:
    config = OptimizerConfig(lr=2.0, min_lr=0.5, warmup_steps=4)
    factors = [lr_factor(step, config, steps=14) for step in range(14)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0 and factors[13] == 0.25 and factors[3:] == sorted(factors[3:], reverse=True)
    cosine = 0.25 + 0.75 * (1 + torch.cos(torch.pi * torch.arange(10).double() / 9)) / 2
    torch.testing.assert_close(torch.tensor(factors[4:], dtype=torch.float64), cosine)


def test_alpha_ramp() -> None:
    assert [alpha_at(step, alpha=0.4, warmup_steps=4) for step in (0, 1, 2, 4, 9)] == [0.0, 0.1, 0.2, 0.4, 0.4]
    assert alpha_at(0, alpha=0.4, warmup_steps=0) == 0.4


def test_random_state_follows_from_its_arguments() -> None:
    def draw(*arguments: int) -> float:
        seed_everything(*arguments)
        return torch.rand(()).item()

    drawn = [draw(0, 0, 0), draw(1, 0, 0), draw(0, 1, 0), draw(0, 0, 1)]
    assert len(set(drawn)) == 4 and draw(0, 0, 0) == drawn[0]


def test_alpha_rises_over_steps_or_epochs() -> None:
    def alpha(step: int, **options) -> float:
        config = SoftMaskPPConfig(alpha=0.4, **options)
        return SoftMaskPPTask().step_options(config, step, steps_per_epoch=10.5)["alpha"]

    assert [alpha(step, alpha_warmup_steps=8) for step in (0, 2, 8, 99)] == pytest.approx([0, 0.1, 0.4, 0.4])
    assert [alpha(step, alpha_warmup_epochs=2) for step in (0, 7, 21, 99)] == pytest.approx([0, 0.4 / 3, 0.4, 0.4])
    assert alpha(0) == 0.4
    with pytest.raises(ValueError, match="alpha_warmup_epochs: expected at least 0, and 0 beside alpha_warmup_steps"):
        SoftMaskPPConfig(alpha_warmup_steps=1, alpha_warmup_epochs=1)


def test_weight_decay_spares_vectors_positions_and_class_tokens(tmp_path) -> None:
    trainer = make_trainer(make_config(tmp_path))
    decayed, plain = parameter_groups(trainer.model, OptimizerConfig(weight_decay=0.3))
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    spared = {
        "backbone.vision.vit.cls_token",
        "backbone.vision.vit.pos_embed",
        "backbone.text.embeddings.position.weight",
    }
    assert all(p.ndim >= 2 and not names[id(p)].endswith("bias") for p in decayed["params"])
    assert {names[id(p)] for p in plain["params"] if p.ndim >= 2 and not names[id(p)].endswith("bias")} == spared
    trained = sum(p.requires_grad for p in trainer.model.parameters())
    assert len(decayed["params"]) + len(plain["params"]) == trained
    assert any(names[id(p)] == "temperature" for p in plain["params"])


def test_learning_rates_of_parts(tmp_path) -> None:
    """The longest start of a parameter's name decides; whole parts of names count ("text" is no start of "text_x")."""
    model = make_trainer(make_config(tmp_path)).model
    scales = {"backbone.text": 0.5, "backbone.text.embeddings": 4.0, "itm_head.weight": 2.0}
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1, lr_scales=scales)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in parameter_groups(model, config):
        assert group["lr"] == 1e-2 * group["lr_scale"]
        assert group["weight_decay"] == (0.1 if group["decayed"] else 0.0)
        found |= {names[id(parameter)]: group["lr_scale"] for parameter in group["params"]}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(found) == sorted(trained)
    assert {name for name in found if found[name] == 4.0} == {n for n in trained if ".text.embeddings." in n}
    assert {name for name in found if found[name] == 0.5} == {n for n in trained if ".text.layers." in n}
    assert found["itm_head.weight"] == 2.0 and found["itm_head.bias"] == 1.0
    assert found["backbone.text_projection.weight"] == found["backbone.fusion.layers.0.feed_forward.up.weight"] == 1.0


def test_a_learning_rate_for_no_parameter_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"optimizer.lr_scales: no trained parameter's .* starts with 'backbone.txt'"):
        make_trainer(make_config(tmp_path, "optimizer.lr_scales={backbone.txt: 2}"))


# -- steps ------------------------------------------------------------------------------------------------------------


def plain_training(config: Config, model: SoftMaskPP, tokenizer) -> SoftMaskPP:
    """The documented loop without DeepSpeed: mean of the micro-batches' gradients, clipped; one EMA update a step."""
    options = config.optimizer
    batches = iter(Loader(open_source(config.data.train), config.data, tokenizer, batch_size=8, seed=config.seed))
    optimizer = torch.optim.AdamW(parameter_groups(model, options), betas=options.betas, eps=options.eps, fused=True)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    micro_batch = 0
    for step in range(config.train.steps):
        model.update_momentum()
        for _ in range(config.train.accumulation):
            seed_everything(config.seed, micro_batch, 0)
            fuse = step >= config.model.contrast_steps
            output = model(next(batches), alpha=config.model.alpha * min(step / 4, 1.0), fuse=fuse)
            (output.loss / config.train.accumulation).backward()
            model.enqueue(output)
            micro_batch += 1
        for parameter in trained:
            if parameter.grad is None:  # no loss has reached it yet: to DeepSpeed its gradient is zero
                parameter.grad = torch.zeros_like(parameter)
        if config.train.clip_grad:
            torch.nn.utils.clip_grad_norm_(trained, config.train.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * group["lr_scale"] * lr_factor(step, options, steps=config.train.steps)
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_is_the_documented_loop(tmp_path, accumulation: int, clip: float) -> None:
    overrides = ["train.steps=4", f"train.accumulation={accumulation}", f"train.clip_grad={clip}"]
    overrides += ["optimizer.lr_scales={backbone.text.embeddings: 3, backbone.vision: 0.5}", "model.contrast_steps=1"]
    trained = run_here(make_config(tmp_path, *overrides))
    config = make_config(tmp_path, *overrides, f"output={tmp_path / 'plain'}")
    tokenizer = prepare_run(config, open_source(config.data.train), None)
    torch.manual_seed(config.seed)
    expected = plain_training(config, build_model(config, tokenizer).train(), tokenizer)
    assert_equal(weights(trained), expected.state_dict())


def test_activation_checkpointing_changes_nothing(tmp_path) -> None:
    one = run_here(make_config(tmp_path, "train.steps=3"))
    output = f"output={tmp_path / 'checkpointing'}"
    other = run_here(make_config(tmp_path, "train.steps=3", "train.activation_checkpointing=true", output))
    assert_equal(weights(one), weights(other))


@pytest.mark.parametrize("stage", ZERO)
def test_loss_scale_drops_out(tmp_path, monkeypatch, stage: int) -> None:
    """A power of two as loss scale, clipping included, must not change one bit of an fp32 run."""
    overrides = ["train.steps=3", "train.clip_grad=0.5", f"deepspeed.zero_optimization.stage={stage}"]
    expected = weights(run_here(make_config(tmp_path, *overrides)))
    create = GradientGuard.__init__
    monkeypatch.setattr(GradientGuard, "__init__", lambda self, *, dynamic, **rest: create(self, dynamic=True, **rest))
    scaled = run_here(make_config(tmp_path, *overrides, f"output={tmp_path / 'scaled'}"))
    assert scaled.guard.value == 65536.0
    assert_equal(weights(scaled), expected)


@pytest.mark.parametrize(("precision", "stage"), [("bf16", 0), ("bf16", 2), ("fp16", 1), ("bf16", 3)])
def test_low_precision(tmp_path, precision: str, stage: int) -> None:
    """Products are cast; weights, twin, queue and optimizer state are not."""
    overrides = [f"train.precision={precision}", "train.clip_grad=1", f"deepspeed.zero_optimization.stage={stage}"]
    config = make_config(tmp_path, *overrides, "train.steps=4")
    dtypes = set()
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _inputs, output: dtypes.add(output.dtype) if isinstance(module, torch.nn.Linear) else None
    )
    try:
        trainer = run_here(config)
    finally:
        hook.remove()
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float16}
    tensors = saved_state(config.output).values()
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} <= {torch.float32, torch.float64}
    assert trainer.progress.step == 4 and all(row["loss"] == row["loss"] for row in rows(config.output))


# -- what is skipped --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("poison", [poison_loss, poison_images, poison_gradients])
def test_nonfinite_steps_are_skipped_and_counted(tmp_path, monkeypatch, stage: int, poison) -> None:
    config = make_config(tmp_path, "train.steps=4", f"deepspeed.zero_optimization.stage={stage}")
    poison(monkeypatch, lambda forward: forward in (1, 2))
    trainer = run_here(config)
    assert (trainer.progress.step, trainer.progress.micro_batches, trainer.progress.nonfinite) == (4, 6, 2)
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())
    events = rows(config.output, "events.jsonl")
    assert [(event["event"], event["step"], event["micro_batch"]) for event in events] == [
        ("nonfinite", 2, 1),
        ("nonfinite", 2, 2),
    ]
    assert trainer.engine.lr_scheduler.last_epoch == 4  # the schedule counts the steps that were taken


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("poison", [poison_loss, poison_images, poison_gradients])
def test_too_many_nonfinite_steps_stop_with_the_weights_unchanged(tmp_path, monkeypatch, stage: int, poison) -> None:
    overrides = ["train.max_nonfinite=3", "train.checkpoint_every=1", f"deepspeed.zero_optimization.stage={stage}"]
    trainer = make_trainer(make_config(tmp_path, *overrides))
    poison(monkeypatch, lambda forward: forward >= 2)
    with pytest.raises(TrainingError, match="3 times in a row up to micro-batch 4, after step 2"):
        trainer.run()
    model, _, _ = load_model(trainer.config.output)
    saved = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("twin.")}
    kept = weights(trainer, twin=False)
    if poison is poison_gradients:  # their losses were finite, so queue and running statistics have moved on
        moved = ("contrast.", "running_", "num_batches_tracked")
        saved, kept = (
            {name: tensor for name, tensor in state.items() if not any(part in name for part in moved)}
            for state in (saved, kept)
        )
    assert_equal(saved, kept)
    assert trainer.progress.step == 2


def test_a_skipped_batch_in_an_accumulated_step_is_replaced(tmp_path, monkeypatch) -> None:
    config = make_config(tmp_path, "train.steps=2", "train.accumulation=2")
    poison_loss(monkeypatch, lambda forward: forward == 1)
    trainer = run_here(config)
    assert (trainer.progress.step, trainer.progress.micro_batches, trainer.engine.micro_steps) == (2, 5, 4)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_fp16_overflow_halves_the_loss_scale(tmp_path, monkeypatch, stage: int) -> None:
    overrides = ["train.precision=fp16", "train.steps=3", f"deepspeed.zero_optimization.stage={stage}"]
    poison_gradients(monkeypatch, lambda forward: forward == 1)
    trainer = run_here(make_config(tmp_path, *overrides))
    assert trainer.progress.nonfinite >= 1
    assert trainer.guard.value == 65536.0 / 2**trainer.progress.nonfinite
    state = json.loads((find_checkpoint(trainer.config.output) / "trainer.json").read_text())
    assert state["loss_scale"] == trainer.guard.state_dict()


def test_the_loss_scale_grows(tmp_path) -> None:
    trainer = make_trainer(make_config(tmp_path))
    guard = GradientGuard(dynamic=True, growth_interval=2)
    guard.attach(trainer.engine)
    trainer.engine.optimizer.overflow = False
    values = [(guard.after_step(), guard.value)[1] for _ in range(4)]
    assert values == [65536.0, 131072.0, 131072.0, 262144.0]


def test_unreadable_samples_are_named(tmp_path) -> None:
    data = write_shard(tmp_path / "broken.tar", broken=(5, 9))
    config = make_config(tmp_path, "train.epochs=1", "train.steps=0", "data.max_bad_share=0.5", data=data)
    trainer = run_here(config)
    assert trainer.progress.step == 8 and trainer.progress.skipped_samples >= 2
    text = " ".join(event["sample"] for event in rows(config.output, "events.jsonl"))
    assert "000005" in text and "000009" in text and "broken.tar" in text


def test_too_many_unreadable_samples_end_the_run_over_resumes(tmp_path, monkeypatch) -> None:
    """A tenth is bad and 3 % are allowed: ten steps show it, whether in one run or in two."""
    data = write_shard(tmp_path / "broken.tar", broken=tuple(range(0, 64, 10)))
    options = ["train.steps=40", "train.checkpoint_every=4", "data.max_bad_share=0.03"]
    with pytest.raises(DataError, match=r"samples are unreadable, more than data.max_bad_share=0.03; .*broken.tar"):
        run_here(make_config(tmp_path, *options, f"output={tmp_path / 'whole'}", data=data))
    ended = rows(tmp_path / "whole")[-1]["step"]
    halves = make_config(tmp_path, *options, data=data)
    with monkeypatch.context() as patch:
        patch.setattr("softmask.training.trainer.check_bad_share", lambda *_, **__: None)
        run_here(dataclasses.replace(halves, train=dataclasses.replace(halves.train, steps=ended - 1)))
    with pytest.raises(DataError, match="samples are unreadable"):
        run_here(halves, checkpoint=find_checkpoint(halves.output))
    assert rows(halves.output)[-1]["step"] == ended


# -- what a run leaves behind -----------------------------------------------------------------------------------------


def test_files_of_a_run(tmp_path, capfd) -> None:
    config = make_config(tmp_path, "train.log_every=2", "train.checkpoint_every=2", "train.accumulation=2")
    trainer = run_here(config)
    run = Path(config.output)
    logged = rows(config.output)
    assert [row["step"] for row in logged] == [2, 4, 6]
    assert [row["epoch"] for row in logged] == [0.5, 1.0, 1.5]
    assert {"loss", "itc", "itm", "itm_soft", "mlm", "temperature", "lr", "samples_per_second"} <= logged[0].keys()
    assert [row["lr"] for row in logged] == [1e-3 * lr_factor(step, config.optimizer, steps=6) for step in (1, 3, 5)]
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_00000004", "step_00000006"]
    assert json.loads((run / "done.json").read_text())["steps"] == 6
    assert list((run / "tensorboard").iterdir())
    state = json.loads((find_checkpoint(run) / "trainer.json").read_text())
    assert (state["step"], state["micro_batches"], state["world_size"]) == (6, 12, 1)
    output = capfd.readouterr().err
    for line in (
        "data     64 captions of 64 pictures in 1 files",
        "batch    16 = 8 x 2 accumulated x 1 ranks",
        "weights  random",
        "words    45 tokens of a WordPiece trained on the captions",
        "text     16 tokens at most, 0 of the first 64 captions are cut there",
    ):
        assert line in output.splitlines()
    (options,) = [line for line in output.splitlines() if line.startswith("options  ")]
    assert " train.accumulation=2 " in options and " model.queue_size=32 " in options and "gamma" not in options
    assert "step 4/6  loss " in output and "done: 6 steps" in output
    model, tokenizer, loaded = load_model(run)
    assert loaded == config and not model.training
    assert model.config.text.vocab_size == tokenizer.vocab_size
    assert_equal(weights(trainer), model.state_dict())


def test_checkpoints_that_cannot_be_used(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_checkpoint(tmp_path)
    config = make_config(tmp_path, "train.steps=1")
    run_here(config)
    checkpoint = find_checkpoint(config.output)
    file = checkpoint / "mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="step_00000001: cannot be read"):
        load_model(checkpoint)
    with pytest.raises(CheckpointError, match="step_00000001: cannot be loaded"):
        run_here(config, checkpoint=checkpoint)
    file.unlink()
    with pytest.raises(CheckpointError, match="step_00000001: cannot be read"):
        load_model(checkpoint)


def test_a_folder_that_holds_a_run_is_left_alone(tmp_path) -> None:
    config = make_config(tmp_path, "train.steps=1")
    run = Path(config.output)
    assert choose_checkpoint(config, "none") is None and choose_checkpoint(config, "auto") is None
    unfinished = run / "checkpoints" / "step_00000009.tmp"
    unfinished.mkdir(parents=True)
    assert choose_checkpoint(config, "auto") is None
    for number in (4, 8):
        folder = run / "checkpoints" / f"step_{number:08d}"
        folder.mkdir()
        (folder / "trainer.json").write_text("{}")
    assert choose_checkpoint(config, "auto").name == "step_00000008"
    with pytest.raises(CheckpointError, match="holds a run already .*--resume auto"):
        choose_checkpoint(config, "none")
    with pytest.raises(CheckpointError, match="step_00000008, which starting from .*step_00000004 would overwrite"):
        choose_checkpoint(config, str(run / "checkpoints" / "step_00000004"))
    elsewhere = make_config(tmp_path, f"output={tmp_path / 'other'}")
    assert choose_checkpoint(elsewhere, str(run)).name == "step_00000008"


def test_logs_are_cut_back(tmp_path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    cut_back(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    path.write_text('{"step": 1}\n{"ste')
    cut_back(path, 2)
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.train=nowhere-*.tar"], "no file matches nowhere-*.tar"),
        (["--resume", "elsewhere"], "elsewhere: expected a step_... checkpoint or a run"),
        (["data.tokenizer=nowhere"], "data.tokenizer: nowhere is not a folder"),
    ],
)
def test_a_failure_is_one_line(tmp_path, monkeypatch, capfd, arguments: list[str], message: str) -> None:
    config = make_config(tmp_path)
    save_config(config, tmp_path / "config.yaml")
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--config", str(tmp_path / "config.yaml"), *arguments])
    assert main() == 2
    lines = "".join(capfd.readouterr()).strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], lines
    assert not (Path(config.output) / "checkpoints").exists()


@pytest.mark.parametrize("parameters", [7, 8])
def test_buckets_hold_the_model_and_are_even(parameters: int, tmp_path) -> None:
    section = deepspeed_config(make_config(tmp_path, "deepspeed.zero_optimization.stage=1"), parameters=parameters)
    assert section["zero_optimization"]["allgather_bucket_size"] == 8
    assert section["zero_optimization"]["reduce_bucket_size"] == 8


def test_a_longer_run_that_is_stopped_is_not_taken_for_finished(tmp_path) -> None:
    run_here(make_config(tmp_path, "train.steps=2"))
    config = make_config(tmp_path, "train.steps=4")
    done = Path(config.output) / "done.json"
    assert done.exists()
    prepare_run(config, open_source(config.data.train), find_checkpoint(config.output))
    assert not done.exists()


def test_a_queue_smaller_than_the_batch_is_refused_before_the_first_step(tmp_path) -> None:
    with pytest.raises(ConfigError, match="model.queue_size: expected 0 or at least the batch of all ranks, 8, got 4"):
        make_trainer(make_config(tmp_path, "model.queue_size=4"))
