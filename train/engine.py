"""The DeepSpeed engine of a run: start-up, its configuration, and gradients that are scaled, checked and clipped alike
at every ZeRO stage and precision."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from softmask.train.config import Config, ConfigError
from softmask.train.deepspeed_section import why_refused
from softmask.train.launchers import complete_environment
from softmask.train.schedule import group_options, parameter_groups, scheduler_factory

AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}


def start_distributed() -> None:
    """Choose the accelerator, complete the environment and join the process group.

    Called before anything imports DeepSpeed.
    """
    choose_accelerator()
    complete_environment()
    if torch.cuda.is_available():
        check_device(int(os.environ["LOCAL_RANK"]), torch.cuda.device_count())
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Answered before it is asked: DeepSpeed would try to compile and link every op it has, the linker's complaints
    # included, and then build an all-reduce for inference (40 seconds) on every CPU machine. Nothing else reads this.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    deepspeed.init_distributed(verbose=False)


def choose_accelerator() -> None:
    """Spare DeepSpeed, which chooses its accelerator on import, the search for one.

    Raises:
        ConfigError: DS_ACCELERATOR names one that is not here.
    """
    present = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if (chosen := os.environ.get("DS_ACCELERATOR") or present[0]) not in present:
        raise ConfigError(f"environment: DS_ACCELERATOR: expected {' or '.join(present)} here, got {chosen!r}")


def check_device(local_rank: int, count: int) -> None:
    """ConfigError where there are more ranks than GPUs."""
    if local_rank >= count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        of = f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else ""
        raise ConfigError(
            f"LOCAL_RANK: expected one rank a GPU, below {count}{of}, got {local_rank}; start as many ranks as GPUs"
        )


class GradientGuard:
    """Loss scale of fp16 (dynamic) and, at every precision, no step on gradients that are not finite.

    DeepSpeed 0.19's own scaling under torch_autocast clips scaled gradients by the unscaled norm, updates the scale
    once per parameter group, and neither lowers it after a skipped step nor saves it; its clipping at stage 0 fails on
    parameters without dimensions. Here one scale belongs to the step. ZeRO 1 to 3 divide by it, clip and skip
    themselves (`override_loss_scale`); at stage 0 the engine calls this object as its gradient scaler.
    """

    def __init__(self, *, dynamic: bool, clip_grad: float = 0.0, growth_interval: int = 2000) -> None:
        self.dynamic = dynamic
        self.clip_grad = clip_grad
        self.growth_interval = growth_interval
        self.value = 65536.0 if dynamic else 1.0
        self.good_steps = 0

    def attach(self, engine: Any) -> None:
        if engine.zero_optimization():
            engine.optimizer.torch_autocast_gradscaler = None
        else:
            engine.torch_autocast_z0_gradscaler = self
        self._engine = engine
        self._publish()

    def _publish(self) -> None:
        if self._engine.zero_optimization():
            self._engine.optimizer.override_loss_scale(self.value)

    def after_step(self) -> bool:
        """Adjust the scale after an optimizer step; False: the gradients were not finite, nothing was changed."""
        finite = not self._engine.optimizer.overflow
        if self.dynamic:
            self.good_steps = self.good_steps + 1 if finite else 0
            if not finite:
                self.value /= 2
            elif self.good_steps % self.growth_interval == 0:
                self.value *= 2
            self._publish()
        return finite

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.good_steps = state["value"], state["good_steps"]
        self._publish()

    # -- what the engine calls at ZeRO stage 0 ----------------------------------------------------------------------

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self.value if self.dynamic else loss

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Unscale, clip, and step unless a gradient is not finite; every rank holds the same, reduced gradients."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        grads = [parameter.grad for parameter in parameters]
        if self.dynamic:
            torch._foreach_div_(grads, self.value)
        if self.clip_grad:
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip_grad)
        else:
            norm = torch.stack(torch._foreach_norm(grads))
        optimizer.overflow = not bool(norm.isfinite().all())  # the engine reads it and leaves the schedule alone
        if not optimizer.overflow:
            optimizer.step()

    def update(self) -> None:
        """The scale is adjusted by `after_step`, the same way at every stage."""


def deepspeed_config(config: Config, *, parameters: int) -> dict[str, Any]:
    """The user's DeepSpeed section, completed by what follows from the rest of the configuration and from the number
    of trained parameters."""
    train = config.train
    # DeepSpeed allocates whole buckets in every step, by default of 2 GB, and wants even sizes.
    bucket = min(parameters + parameters % 2, 500_000_000)
    buckets = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket} if config.zero_stage else {}
    section = {
        **config.deepspeed,
        "zero_optimization": buckets | config.deepspeed.get("zero_optimization", {}),
        "train_micro_batch_size_per_gpu": train.batch_size,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.clip_grad if config.zero_stage else 0.0,  # at stage 0 the guard clips
    }
    if train.precision in AUTOCAST:
        # Weights, momentum twin, queue and reduced gradients stay fp32; only the products of the forward are cast.
        autocast = {"enabled": True, "dtype": AUTOCAST[train.precision], "lower_precision_safe_modules": []}
        section["torch_autocast"] = autocast
    return section


def create_engine(model: nn.Module, config: Config, *, steps: int) -> tuple[Any, GradientGuard]:
    """Engine around `model`, with AdamW and the schedule. A forward pass through it gives (loss, output)."""
    import deepspeed

    options = config.optimizer
    groups = parameter_groups(model, options)
    parameters = sum(parameter.numel() for group in groups for parameter in group["params"])
    optimizer = torch.optim.AdamW(
        groups,
        betas=options.betas,
        eps=options.eps,
        fused=True,
    )
    # DeepSpeed prepares its backward in hooks on the output's tensors, and looks for them in tuples, not dataclasses.
    model.register_forward_hook(lambda _module, _inputs, output: (output.loss, output))
    section = deepspeed_config(config, parameters=parameters)
    try:
        deepspeed.DeepSpeedConfig(section)
    except Exception as error:  # it raises whatever a wrong value runs into
        raise ConfigError(why_refused(error, section)) from error
    if "offload_optimizer" in section.get("zero_optimization", {}) and section.get("zero_force_ds_cpu_optimizer", True):
        raise ConfigError(
            "deepspeed.zero_optimization.offload_optimizer: DeepSpeed refuses it beside an optimizer that is not its "
            "own; expected deepspeed.zero_force_ds_cpu_optimizer=false too"
        )
    with _scalars_kept_from_broadcast(model):
        if config.zero_stage == 3:
            _partition(model, section)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=scheduler_factory(options, steps=steps),
            config=section,
            dist_init_required=False,
        )
    if config.zero_stage == 3:
        for module in model.modules():
            module.register_forward_hook(_release_after_each_backward)
    guard = GradientGuard(dynamic=config.train.precision == "fp16", clip_grad=config.train.clip_grad)
    guard.attach(engine)
    return engine, guard


def _partition(model: nn.Module, section: dict[str, Any]) -> None:
    """Leave each rank its share of every parameter, as `deepspeed.initialize` would at stage 3, without the broadcast
    of parameters that have no dimensions (see `_scalars_kept_from_broadcast`)."""
    from deepspeed.runtime.zero.partition_parameters import Init

    class Partition(Init):
        def _zero_init_param(self, param: nn.Parameter) -> None:
            if param.ndim:
                super()._zero_init_param(param)
            else:
                self._convert_to_deepspeed_param(param)
                param.partition()

    Partition(module=model, config_dict_or_path=section)
    for parameter in model.parameters():
        _, owned = own_range(parameter)
        parameter.ds_tensor[owned:].zero_()  # else equal runs write unequal padding into their checkpoints
    for module in model.modules():
        # DeepSpeed fetches a module's parameters for as many backward passes as it had forward passes. The gradient
        # that the word map takes in the middle of the forward pass is one more; this count never ends.
        module.applied_pre_backward_ref_cnt = 1 << 62


def _release_after_each_backward(module: nn.Module, _inputs: Any, output: Any) -> None:
    """Forward hook, after DeepSpeed's own. DeepSpeed releases a module's parameters when its inputs have all had their
    gradient, but counts the inputs of the last forward pass only: a module that was called more than once, as the
    fusion layers are, would keep its parameters from its second backward pass to the end of the step."""
    inputs = module.ds_grads_remaining

    def count_again(_gradient: torch.Tensor) -> None:
        module.ds_grads_remaining = inputs

    for tensor in output if isinstance(output, tuple) else (output,):
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            tensor.register_hook(count_again)


def own_range(parameter: nn.Parameter) -> tuple[int, int]:
    """First and number of a parameter's elements that this rank holds at ZeRO stage 3; what follows is padding."""
    width = parameter.ds_tensor.numel()
    start = min(dist.get_rank() * width, parameter.ds_numel)
    return start, min(width, parameter.ds_numel - start)


def full_size(parameter: nn.Parameter) -> int:
    """Number of a parameter's elements, on all ranks together at ZeRO stage 3."""
    return getattr(parameter, "ds_numel", parameter.numel())


@contextmanager
def _scalars_kept_from_broadcast(model: nn.Module) -> Iterator[None]:
    """DeepSpeed 0.19 broadcasts the weights of rank 0 as bytes, and a tensor without dimensions has no such view.

    Its mark for parameters that ranks do not share spares them; all ranks built the same weights from the seed.
    """
    scalars = [parameter for parameter in model.parameters() if parameter.ndim == 0]
    for parameter in scalars:
        parameter.ds_optim_param = True
    yield
    for parameter in scalars:
        del parameter.ds_optim_param


def apply_hyperparameters(engine: Any, config: Config) -> None:
    """Make the configuration win over the optimizer settings that a checkpoint brought along."""
    options = config.optimizer
    scheduler = engine.lr_scheduler
    groups = scheduler.optimizer.param_groups
    for group in groups:
        group.update(group_options(options, lr_scale=group["lr_scale"], decayed=group["decayed"]))
        group.update(initial_lr=group["lr"], betas=options.betas, eps=options.eps)
        group["lr"] *= scheduler.lr_lambdas[0](scheduler.last_epoch)
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
