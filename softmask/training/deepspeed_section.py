"""Checks of the `deepspeed` section: DeepSpeed's own keys, except those that follow from ours.

DeepSpeed ignores unknown keys silently; here they are errors.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

# Keys that follow from ours -> what to use instead.
OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "train.batch_size and train.accumulation",
    "train_micro_batch_size_per_gpu": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulation",
    "managed_gradient_accumulation": "train.accumulation",
    "gradient_clipping": "train.clip_grad",
    "optimizer": "optimizer",
    "scheduler": "optimizer.lr, optimizer.min_lr and optimizer.warmup_steps",
    "fp16": "train.precision=fp16",
    "bf16": "train.precision=bf16",
    "bfloat16": "train.precision=bf16",
    "torch_autocast": "train.precision",
    "amp": "train.precision",
    "activation_checkpointing": "train.activation_checkpointing",
    "tensorboard": "output (the run's folder always holds tensorboard/)",
}
_FREE = """
aio autotuning checkpoint comet comms_logger communication_data_type compile compression_training csv_monitor
curriculum_learning data_efficiency data_types dataloader_drop_last disable_allgather disable_python_gc dump_state
eigenvalue elasticity flops_profiler gradient_allreduce_op gradient_predivide_factor hybrid_engine log_level
memory_breakdown nebula prescale_gradients progressive_layer_drop seq_parallel_communication_data_type sparse_attention
sparse_gradients steps_per_print tensor_parallel timers use_data_before_expert_parallelism use_node_local_storage
vocabulary_size wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
zero_optimization
"""
FREE_DEEPSPEED_KEYS = frozenset(_FREE.split())  # of DeepSpeed 0.19
# Sections whose keys DeepSpeed does not check.
KEYS_OF_SECTIONS = {
    "aio": "block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds",
    "checkpoint": "tag_validation load_universal use_node_local_storage parallel_write",
    "data_types": "grad_accum_dtype",
    "flops_profiler": "enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file",
}


def check_deepspeed(section: dict[str, Any]) -> None:
    """Raise ValueError for the first key that follows from ours or that DeepSpeed does not know."""
    for key in section:
        if key in OWNED_DEEPSPEED_KEYS:
            raise ValueError(f"deepspeed.{key}: set by this configuration, use {OWNED_DEEPSPEED_KEYS[key]} instead")
        _known("deepspeed.", key, FREE_DEEPSPEED_KEYS)
    for key, known in KEYS_OF_SECTIONS.items():
        section_of_key = section.get(key, {})
        if not isinstance(section_of_key, dict):
            raise ValueError(f"deepspeed.{key}: expected a mapping, got {section_of_key!r}")
        for name in section_of_key:
            _known(f"deepspeed.{key}.", name, known.split())


def _known(prefix: str, key: str, known: Iterable[str]) -> None:
    if key not in known:
        near = difflib.get_close_matches(str(key), known, n=1)
        hint = f"; did you mean {prefix}{near[0]}?" if near else ""
        raise ValueError(f"{prefix}{key}: unknown to DeepSpeed, which would ignore it{hint}")


def why_refused(error: Exception, section: dict[str, Any]) -> str:
    """One line on why DeepSpeed, or its pydantic models, refused a section."""
    if not isinstance(error, ValidationError):
        return f"deepspeed: {' '.join(str(error).split()) or type(error).__name__}"
    first = error.errors()[0]
    holds = [name for name, value in section.items() if isinstance(value, dict)]
    names = [name for name in holds if first["loc"] and first["loc"][0] in section[name]]
    key = ".".join(map(str, ["deepspeed", *names[:1], *first["loc"]]))
    return f"{key}: {first['msg']}, got {first['input']!r}"
