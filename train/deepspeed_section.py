"""The `deepspeed` section: DeepSpeed's own keys, of which some follow from ours and none may be misspelt.

DeepSpeed reads the keys that it knows and passes over all others without a word.
"""

from __future__ import annotations

import difflib
from typing import Any

# Set in two places, they could disagree.
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
    "tensorboard": "output (a run's folder always holds tensorboard/)",
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


def check_deepspeed(section: dict[str, Any]) -> None:
    """ValueError naming the first key that this configuration sets itself, or that DeepSpeed does not know."""
    for key in section:
        if key in OWNED_DEEPSPEED_KEYS:
            raise ValueError(f"deepspeed.{key}: set by this configuration, use {OWNED_DEEPSPEED_KEYS[key]} instead")
        if key not in FREE_DEEPSPEED_KEYS:
            near = difflib.get_close_matches(str(key), FREE_DEEPSPEED_KEYS, n=1)
            hint = f"; did you mean deepspeed.{near[0]}?" if near else ""
            raise ValueError(f"deepspeed.{key}: DeepSpeed knows no such key and would pass over it{hint}")
