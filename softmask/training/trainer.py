"""The training loop: optimizer steps, logs, checkpoints.

Exact resumption rests on three things: the engine's checkpoint holds weights, momentum encoder, queue, optimizer and
schedule; the order of the data is a function of the number of micro-batches consumed; and so is the random state of
every micro-step (`seed_everything`).
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from softmask.data import Batch, CaptionTokenizer, Loader, Source
from softmask.data.loader import check_bad_share
from softmask.ranges import named_range
from softmask.training.checkpoint.initial import text_facts, weights_from, words_from
from softmask.training.checkpoint.state import Progress, write_json
from softmask.training.checkpoint.store import (
    add_to_state,
    build_model,
    check_data,
    check_resumable,
    data_facts,
    load_checkpoint,
    save_checkpoint,
    without_files,
)
from softmask.training.config import Config, ConfigError, ProfileConfig, chosen
from softmask.training.engine.startup import start_distributed
from softmask.training.engine.zero import apply_hyperparameters, create_engine, full_size
from softmask.training.interface import StepOutput, TrainedModel
from softmask.training.logs import RunLog, clock, say
from softmask.training.optim import groups_digest, lr_factor, seed_everything
from softmask.training.profiling import StepProfiler
from softmask.training.run_folder import prepare_run
from softmask.training.validation import Validate, Validation

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TrainingError(RuntimeError):
    """Training cannot continue."""


def train(
    config: Config, *, checkpoint: Path | None = None, validator: Callable[[Config], Validate | None] | None = None
) -> Trainer:
    """Train from scratch or from `checkpoint`, to the end or until a stop signal. `validator` is for tasks after
    pre-training: it opens the held-out data, once the training data are open.

    Every rank calls it with the same arguments. `finished` of the returned trainer says whether it reached the end.
    """
    source = config.find_task().open(config.data.train, config.data, split="train")
    validate = validator(config) if validator else None
    start_distributed()
    if checkpoint is not None:
        check_resumable(checkpoint, config, world_size=dist.get_world_size())
        check_data(checkpoint, source)
    tokenizer = prepare_run(config, source, checkpoint)
    if validate is not None:
        validate.check(tokenizer)
    trainer = Trainer(config, source, tokenizer, checkpoint=checkpoint, validate=validate)
    trainer.run()
    return trainer


class Trainer:
    """One rank's part of a run."""

    def __init__(
        self,
        config: Config,
        source: Source,
        tokenizer: CaptionTokenizer,
        *,
        checkpoint: Path | None = None,
        validate: Validate | None = None,
    ) -> None:
        self.config = config
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        if not torch.cuda.is_available():
            torch.use_deterministic_algorithms(True, warn_only=True)
            # Deterministic mode fills new buffers, which helps debugging but costs a pass over each. The stubs lack it.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.manual_seed(config.seed)  # the same weights on every rank
        fresh = checkpoint is None and not config.init
        model = build_model(config if fresh else without_files(config), tokenizer)
        self._origins = {
            "weights": weights_from(model, config, checkpoint),
            "words": words_from(tokenizer, config, checkpoint),
        }
        self._source, self._tokenizer = source, tokenizer
        self._task = config.find_task()
        self.batches_per_epoch = self._loader(0).batches_per_epoch
        self.steps = self._count_steps()
        try:
            self._task.check_batch(config.model, config.train.batch_size * self.world_size)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.engine, self.guard = create_engine(model, config, steps=self.steps)
        self.device = self.engine.device
        self.model.set_activation_checkpointing(config.train.activation_checkpointing)
        # BatchNorm's running statistics, which a skipped step must not change.
        self._statistics = self.model.statistics()
        self.progress = Progress()
        self.validation = Validation(validate, config, batches_per_epoch=self.batches_per_epoch)
        if checkpoint is not None:
            self.progress, state = load_checkpoint(self.engine, checkpoint, config)
            self.guard.load_state_dict(state["loss_scale"])
            self.validation.load_state_dict(state.get("validation"))
            apply_hyperparameters(self.engine, config)
        self.finished = False
        self._stop_requested = False
        self._nonfinite_in_row = 0
        self._skipped: list[str] = []
        self._log: RunLog | None = None
        self._header()

    @property
    def model(self) -> TrainedModel:
        return self.engine.module

    def _loader(self, start: int) -> Loader:
        """Batches of this rank from micro-batch `start` on."""
        return Loader(
            self._source,
            self.config.data,
            self._tokenizer,
            batch_size=self.config.train.batch_size,
            rank=self.rank,
            world_size=self.world_size,
            seed=self.config.seed,
            start_batch=start,
            finish=self._task.finish_batch,
        )

    def _count_steps(self) -> int:
        options = self.config.train
        return options.steps or max(1, math.ceil(options.epochs * self.batches_per_epoch / options.accumulation))

    def _header(self) -> None:
        if self.rank:
            return
        options = self.config.train
        trained = sum(full_size(parameter) for parameter in self.engine.module.parameters() if parameter.requires_grad)
        batch = options.batch_size * options.accumulation * self.world_size
        parts = f"{options.batch_size} x {options.accumulation} accumulated x {self.world_size} ranks"
        steps_per_epoch = self.batches_per_epoch / options.accumulation
        say(
            f"run      {self.config.output}: step {self.progress.step} to {self.steps}, {steps_per_epoch:.4g} per epoch"
        )
        say(f"model    {trained:,} trained parameters, {options.precision}")
        for what, origin in self._origins.items():
            say(f"{what:8s} {origin}")
        source = self._source
        say(f"data     {len(source):,} captions of {source.images:,} images in {len(source.paths):,} files")
        say(f"text     {text_facts(self._tokenizer, self.config, source)}")
        say(f"batch    {batch} = {parts}")
        changed = [f"{key}={value}" for key, value in chosen(self.config).items()]
        say(f"options  {' '.join(changed) or 'none but the defaults'}")
        say(f"engine   DeepSpeed on {self.device}, ZeRO stage {self.config.zero_stage}")

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the last step or until a stop signal, then write a checkpoint."""
        run = Path(self.config.output)
        if self.rank == 0:
            self._log = RunLog(run, step=self.progress.step, steps=self.steps)
            for problem in self._source.problems if self.progress.step == 0 else ():
                self._log.note("problem", step=0, problem=problem)
        try:
            with self._signals(), self._profiler() as profiler:
                self._loop(profiler)
            self.finished = self.progress.step >= self.steps or self.validation.gave_up
            if self.finished and self.rank == 0:
                write_json({"steps": self.progress.step, "seconds": self.progress.seconds}, run / "done.json")
        finally:
            if self._log is not None:
                self._log.close()
        if self.rank == 0:
            state = "done" if self.finished else "stopped, go on with --resume auto"
            state += " early, without a better score" * (self.finished and self.progress.step < self.steps)
            say(f"{state}: {self.progress.step} steps in {clock(self.progress.seconds)}")

    def _loop(self, profiler: StepProfiler) -> None:
        batches = iter(self._loader(self.progress.micro_batches))
        self.engine.train()
        started, before = time.monotonic(), self.progress.seconds
        logged_at, logged_micro = started, self.progress.micro_batches
        while self.progress.step < self.steps:
            outputs, stop = self._step(batches)
            profiler.advance()
            step = self.progress.step
            now = time.monotonic()
            self.progress.seconds = before + now - started
            if step % self.config.train.log_every == 0 or step == self.steps:
                consumed = (self.progress.micro_batches - logged_micro) * self.config.train.batch_size
                self._log_row(outputs, samples_per_second=consumed * self.world_size / (now - logged_at))
                logged_at, logged_micro = time.monotonic(), self.progress.micro_batches
            due = self.validation.is_due(step, last=step == self.steps)
            every = self.config.train.checkpoint_every
            if stop or due or step == self.steps or (every and step % every == 0):
                self._save()
            if due:
                logged_at += self._validate()
            if stop or self.validation.gave_up:
                break

    def _validate(self) -> float:
        """Measure, log, and note the result in the checkpoint of this step. Returns the seconds that it took."""
        begin = time.monotonic()
        found = self.validation.measure(self.engine, self._tokenizer, step=self.progress.step)
        self.engine.train()
        seconds = time.monotonic() - begin
        if self._log is not None:
            text = f"{found.metric} {found.score:.4g} on data.val{' (the best so far)' * found.is_best}"
            rounded = round(seconds, 1)
            self._log.event("validation", text, step=self.progress.step, score=found.score, seconds=rounded)
            add_to_state(Path(self.config.output), self.progress.step, self.validation.state_dict())
        return seconds

    def _profiler(self) -> StepProfiler:
        options = self.config.train.profile if self.rank == 0 else ProfileConfig()
        return StepProfiler(options, Path(self.config.output) / "profile", step=self.progress.step)

    def _step(self, batches: Iterator[Batch]) -> tuple[list[StepOutput], bool]:
        """One optimizer step. Returns the outputs of its micro-steps, and whether a rank was asked to stop.

        A micro-batch whose loss is not finite on some rank is skipped on all and replaced by the next one. A step whose
        gradients are not finite (common in fp16) is skipped as a whole.
        """
        outputs: list[StepOutput] = []
        stop = False
        with named_range("momentum"):
            self.model.update_momentum()
        while True:
            loss, output, asked = self._forward(batches)
            stop |= asked
            if loss is None:
                continue
            last = self.engine.is_gradient_accumulation_boundary()
            with named_range("backward"):
                self.engine.backward(loss)
            with named_range("optimizer"):
                self.engine.step()
            with named_range("queue"):
                self.model.enqueue(output)
            outputs.append(output)
            if not last:
                continue
            if self.guard.after_step():
                break
            self._count_nonfinite("gradients", f"loss scale now {self.guard.value:g}")
            outputs.clear()
        self.progress.step += 1
        self._nonfinite_in_row = 0
        if self._log is not None:
            self._log.advance()
        return outputs, stop

    def _forward(self, batches: Iterator[Batch]) -> tuple[Tensor | None, StepOutput, bool]:
        """Loss (None if not finite on some rank) and output of the next batch, and whether a rank was asked to stop."""
        # Workers inherit the mask of signals, so that they outlive one sent to the process group.
        with named_range("data"), _blocked(STOP_SIGNALS):
            batch = next(batches)
        self._skipped += batch.skipped
        seed_everything(self.config.seed, self.progress.micro_batches, self.rank)
        self.progress.micro_batches += 1
        statistics = [(buffer, buffer.clone()) for buffer in self._statistics]
        steps_per_epoch = self.batches_per_epoch / self.config.train.accumulation
        options = self._task.step_options(self.config.model, self.progress.step, steps_per_epoch=steps_per_epoch)
        with named_range("forward"):
            loss, output = self.engine(batch.to(self.device), **options)
        flags = torch.stack([~loss.detach().isfinite(), torch.tensor(self._stop_requested, device=self.device)]).float()
        if self.world_size > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        broken, stop = flags.bool().tolist()
        if broken:
            for buffer, before in statistics:
                buffer.copy_(before)
            terms = ", ".join(f"{name} {float(value):.4g}" for name, value in output.terms.items())
            self._count_nonfinite("loss", f"on rank 0: {terms}")
            return None, output, stop
        return loss, output, stop

    def _count_nonfinite(self, what: str, detail: str) -> None:
        """Log a loss or gradients that are not finite. Too many in a row end the run."""
        self.progress.nonfinite += 1
        self._nonfinite_in_row += 1
        micro_batch = self.progress.micro_batches - 1
        if self._log is not None:
            where = {"step": self.progress.step + 1, "micro_batch": micro_batch}
            text = f"{what} not finite in micro-batch {micro_batch}, skipped ({detail})"
            self._log.event("nonfinite", text, **where, what=what, detail=detail)
        if self._nonfinite_in_row >= self.config.train.max_nonfinite:
            raise TrainingError(
                f"{what} not finite, {self._nonfinite_in_row} times in a row up to micro-batch {micro_batch}, "
                f"after step {self.progress.step}: train.max_nonfinite reached"
            )

    # -- logs, checkpoints, signals -----------------------------------------------------------------------------------

    def _log_row(self, outputs: list[StepOutput], *, samples_per_second: float) -> None:
        """Means over the step's micro-batches and ranks."""
        names = ["loss", *outputs[0].terms]
        rows = [torch.stack([output.loss.detach(), *output.terms.values()]).double() for output in outputs]
        values = torch.stack(rows).mean(dim=0)
        if self.world_size > 1:
            dist.all_reduce(values)
        self._report_skipped()
        if self._log is None:
            return
        progress, options = self.progress, self.config.optimizer
        self._log.row(
            {
                "step": progress.step,
                "epoch": round(progress.micro_batches / self.batches_per_epoch, 4),
                "lr": options.lr * lr_factor(progress.step - 1, options, steps=self.steps),
                **dict(zip(names, (values / self.world_size).tolist(), strict=True)),
                "samples_per_second": round(samples_per_second, 2),
                "seconds": round(progress.seconds, 3),
            }
        )

    def _report_skipped(self) -> None:
        """Log the unreadable samples of all ranks since the last call. All ranks raise DataError if too many."""
        gathered: list[Any] = [self._skipped]
        if self.world_size > 1:
            gathered = [None] * self.world_size
            dist.all_gather_object(gathered, self._skipped)
        self._skipped = []
        lines = [line for lines in gathered for line in lines]
        self.progress.skipped_samples += len(lines)
        if self._log is not None:
            for line in lines:
                self._log.event("skipped", line, step=self.progress.step, sample=line)
        bad, options = self.progress.skipped_samples, self.config
        read = self.progress.micro_batches * options.train.batch_size * self.world_size + bad
        check_bad_share(bad, read, allowed=options.data.max_bad_share, names=lines[-3:])

    def _save(self) -> None:
        self._report_skipped()
        groups = groups_digest(self.engine.module, self.config.optimizer)
        extra = {"loss_scale": self.guard.state_dict(), "data": data_facts(self._source), "groups": groups}
        extra |= self.validation.state_dict()
        save_checkpoint(self.engine, self.config, self.progress, extra, best_step=self.validation.best_step)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn a stop signal into a request that all ranks obey after the current step."""
        previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}

        def request(number: int, _frame: Any) -> None:
            self._stop_requested = True
            signal.signal(signal.SIGINT, previous[signal.SIGINT])  # a second Ctrl-C interrupts at once

        for number in STOP_SIGNALS:
            signal.signal(number, request)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


@contextmanager
def _blocked(signals: tuple[signal.Signals, ...]) -> Iterator[None]:
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
