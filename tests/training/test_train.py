"""The trainer in this process: what a step computes and what it skips."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from softmask.data import DataError, Loader, open_source
from softmask.models import SoftMaskPP
from softmask.training.checkpoint.store import build_model, find_checkpoint, load_model
from softmask.training.config import Config
from softmask.training.engine.loss_scale import GradientGuard
from softmask.training.optim import lr_factor, parameter_groups, seed_everything
from softmask.training.run_folder import prepare_run
from softmask.training.trainer import TrainingError
from tests.support.train_fixtures import (
    assert_equal,
    make_config,
    make_trainer,
    rows,
    run_here,
    saved_state,
    weights,
    write_shard,
)

ZERO = [0, 1, 2, 3]
pytestmark = pytest.mark.usefixtures("plain_linear")


def poison_loss(monkeypatch, broken) -> None:
    """Make the loss NaN in the forward passes (counted from 0) for which `broken` is true."""
    forward, count = SoftMaskPP.forward, iter(range(1 << 30))

    def poisoned(self, batch, **options):
        output = forward(self, batch, **options)
        if broken(next(count)):
            output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(SoftMaskPP, "forward", poisoned)


def poison_images(monkeypatch, broken) -> None:
    """Give some forward passes NaN images, so that everything computed from them is NaN."""
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


# -- steps ------------------------------------------------------------------------------------------------------------


def plain_training(config: Config, model: SoftMaskPP, tokenizer) -> SoftMaskPP:
    """The documented loop without DeepSpeed: mean of the micro-batches' gradients, clipped; one EMA update per step."""
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
            if parameter.grad is None:  # no loss has reached it yet; DeepSpeed uses a zero gradient
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
def test_training_equals_the_documented_loop(tmp_path, accumulation: int, clip: float) -> None:
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
def test_loss_scale_changes_no_bit(tmp_path, monkeypatch, stage: int) -> None:
    """A power of two as loss scale must not change one bit of an fp32 run, clipping included."""
    overrides = ["train.steps=3", "train.clip_grad=0.5", f"deepspeed.zero_optimization.stage={stage}"]
    expected = weights(run_here(make_config(tmp_path, *overrides)))
    create = GradientGuard.__init__
    monkeypatch.setattr(GradientGuard, "__init__", lambda self, *, dynamic, **rest: create(self, dynamic=True, **rest))
    scaled = run_here(make_config(tmp_path, *overrides, f"output={tmp_path / 'scaled'}"))
    assert scaled.guard.value == 65536.0
    assert_equal(weights(scaled), expected)


@pytest.mark.parametrize(("precision", "stage"), [("bf16", 0), ("bf16", 2), ("fp16", 1), ("bf16", 3)])
def test_low_precision_casts_only_products(tmp_path, precision: str, stage: int) -> None:
    """Weights, momentum encoder, queue and optimizer state stay fp32."""
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


# -- skipped steps and samples ----------------------------------------------------------------------------------------


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
    assert trainer.engine.lr_scheduler.last_epoch == 4  # the schedule counts only the steps taken


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("poison", [poison_loss, poison_images, poison_gradients])
def test_too_many_nonfinite_steps_stop_with_the_weights_unchanged(tmp_path, monkeypatch, stage: int, poison) -> None:
    overrides = ["train.max_nonfinite=3", "train.checkpoint_every=1", f"deepspeed.zero_optimization.stage={stage}"]
    trainer = make_trainer(make_config(tmp_path, *overrides))
    poison(monkeypatch, lambda forward: forward >= 2)
    with pytest.raises(TrainingError, match="3 times in a row up to micro-batch 4, after step 2"):
        trainer.run()
    model, _, _ = load_model(trainer.config.output)
    saved = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("momentum_encoder.")}
    kept = weights(trainer, momentum_encoder=False)
    if poison is poison_gradients:  # their losses were finite, so queue and running statistics have moved on
        moved = ("contrast.", "running_", "num_batches_tracked")
        saved, kept = (
            {name: tensor for name, tensor in state.items() if not any(part in name for part in moved)}
            for state in (saved, kept)
        )
    assert_equal(saved, kept)
    assert trainer.progress.step == 2


def test_skipped_batch_of_an_accumulated_step_is_replaced(tmp_path, monkeypatch) -> None:
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


def test_loss_scale_doubles_after_the_growth_interval(tmp_path) -> None:
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


def test_too_many_unreadable_samples_end_the_run_also_across_resumes(tmp_path, monkeypatch) -> None:
    """A tenth is bad and 3 % are allowed: the run ends at the same step, whether or not it was resumed."""
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
