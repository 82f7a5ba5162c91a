"""The DeepSpeed engine of a run and its configuration, at every ZeRO stage and precision."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from softmask.training.config import Config, ConfigError
from softmask.training.deepspeed_section import why_refused
from softmask.training.engine.loss_scale import GradientGuard
from softmask.training.optim import group_options, parameter_groups, scheduler_factory

AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}


def deepspeed_config(config: Config, *, parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration: the user's section and what follows from the other keys.

    `parameters` is the number of trained parameters.
    """
    train = config.train
    # DeepSpeed allocates whole buckets in every step, by default of 2 GB, and needs even sizes.
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
        # Weights, momentum encoder, queue and reduced gradients stay fp32; only products of the forward pass are cast.
        autocast = {"enabled": True, "dtype": AUTOCAST[train.precision], "lower_precision_safe_modules": []}
        section["torch_autocast"] = autocast
    return section


def create_engine(model: nn.Module, config: Config, *, steps: int) -> tuple[Any, GradientGuard]:
    """The engine of `model`, with AdamW and the schedule. Its forward pass returns (loss, output)."""
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
    # DeepSpeed prepares the backward pass in hooks on the output's tensors, which it finds in tuples, not dataclasses.
    model.register_forward_hook(lambda _module, _inputs, output: (output.loss, output))
    section = deepspeed_config(config, parameters=parameters)
    try:
        deepspeed.DeepSpeedConfig(section)
    except Exception as error:  # wrong values raise errors of many types
        raise ConfigError(why_refused(error, section)) from error
    if "offload_optimizer" in section.get("zero_optimization", {}) and section.get("zero_force_ds_cpu_optimizer", True):
        raise ConfigError(
            "deepspeed.zero_optimization.offload_optimizer: DeepSpeed refuses it with optimizers other than its own; "
            "set deepspeed.zero_force_ds_cpu_optimizer=false too"
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
    """Partition every parameter among the ranks, as `deepspeed.initialize` does at stage 3, but without broadcasting
    parameters without dimensions (see `_scalars_kept_from_broadcast`)."""
    from deepspeed.runtime.zero.partition_parameters import Init

    class Partition(Init):
        def _zero_init_param(self, param: Any) -> None:
            if param.ndim:
                super()._zero_init_param(param)
            else:
                self._convert_to_deepspeed_param(param)
                param.partition()

    Partition(module=model, config_dict_or_path=section)
    parameters: Iterable[Any] = model.parameters()
    for parameter in parameters:
        _, owned = own_range(parameter)
        parameter.ds_tensor[owned:].zero_()  # otherwise equal runs write different padding into their checkpoints
    modules: Iterable[Any] = model.modules()
    for module in modules:
        # DeepSpeed fetches a module's parameters for as many backward passes as there were forward passes. The word map
        # takes one more gradient within the forward pass; this count never runs out.
        module.applied_pre_backward_ref_cnt = 1 << 62


def _release_after_each_backward(module: Any, _inputs: Any, output: Any) -> None:
    """Forward hook, after DeepSpeed's own.

    DeepSpeed releases a module's parameters when all of its inputs have their gradients, but counts only the inputs of
    the last forward pass. A module that is called more than once, like the fusion layers, would keep its parameters
    from its second backward pass to the end of the step.
    """
    inputs = module.ds_grads_remaining

    def count_again(_gradient: torch.Tensor) -> None:
        module.ds_grads_remaining = inputs

    for tensor in output if isinstance(output, tuple) else (output,):
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            tensor.register_hook(count_again)


def gathered(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and whole parameters of a model that is partitioned, one gathered at a time. All ranks iterate together."""
    from deepspeed import zero

    for name, parameter in model.named_parameters():
        with zero.GatheredParameters([parameter]):
            yield name, parameter.data


def own_range(parameter: Any) -> tuple[int, int]:
    """Start and number of the parameter's elements on this rank at ZeRO stage 3; the rest is padding."""
    width = parameter.ds_tensor.numel()
    start = min(dist.get_rank() * width, parameter.ds_numel)
    return start, min(width, parameter.ds_numel - start)


def full_size(parameter: nn.Parameter) -> int:
    """Number of a parameter's elements, over all ranks."""
    return getattr(parameter, "ds_numel", parameter.numel())


@contextmanager
def _scalars_kept_from_broadcast(model: nn.Module) -> Iterator[None]:
    """Exempt parameters without dimensions from DeepSpeed 0.19's broadcast of rank 0's weights.

    It broadcasts them viewed as bytes, which such tensors do not allow. DeepSpeed's mark for parameters that ranks do
    not share exempts them; all ranks have built the same weights from the seed.
    """
    scalars: list[Any] = [parameter for parameter in model.parameters() if parameter.ndim == 0]
    for parameter in scalars:
        parameter.ds_optim_param = True
    yield
    for parameter in scalars:
        del parameter.ds_optim_param


def apply_hyperparameters(engine: Any, config: Config) -> None:
    """Replace the optimizer settings of a loaded checkpoint by those of the configuration."""
    options = config.optimizer
    scheduler = engine.lr_scheduler
    groups = scheduler.optimizer.param_groups
    for group in groups:
        group.update(group_options(options, lr_scale=group["lr_scale"], decayed=group["decayed"]))
        group.update(initial_lr=group["lr"], betas=options.betas, eps=options.eps)
        group["lr"] *= scheduler.lr_lambdas[0](scheduler.last_epoch)
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
