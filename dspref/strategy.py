"""What a DeepSpeed JSON may say in dspref: how memory and communication are laid out, and nothing else.

DeepSpeed ignores unknown top-level keys and turns `"auto"` into a default without a word, so both are refused here.
Loads neither torch nor deepspeed; a test holds the tables against DeepSpeed's own.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dspref import reading
from dspref.errors import ConfigError

# Keys that another section of the YAML owns, and where.
OWNED = {
    "train_batch_size": "train.pairs_per_step",
    "train_micro_batch_size_per_gpu": "data.tokens_per_pack",
    "gradient_accumulation_steps": "data.tokens_per_pack",
    "managed_gradient_accumulation": "dspref, which steps once per global batch",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.optim, train.learning_rate, ...",
    "scheduler": "train.lr_scheduler_type",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "fp32": "model.dtype",
    "torch_autocast": "model.dtype",
    "amp": "model.dtype",
    "data_types": "dspref, which accumulates gradients in fp32",
    "steps_per_print": "log.every",
    "wandb": "log.trackers",
    "tensorboard": "log.trackers",
    "csv_monitor": "metrics.jsonl",
    "activation_checkpointing": "model.gradient_checkpointing",
    "checkpoint": "checkpoint",
    "seed": "train.seed",
}

TOP_LEVEL = (
    "zero_optimization", "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "comms_logger",
    "flops_profiler", "memory_breakdown", "wall_clock_breakdown", "dump_state", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "aio", "disable_allgather", "disable_python_gc",
)  # fmt: skip

OFFLOAD_PARAM = ("device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory")
OFFLOAD_OPTIMIZER = (
    "device", "nvme_path", "buffer_count", "pin_memory", "pipeline_read", "pipeline_write", "fast_init", "ratio",
    "super_offload", "cpuadam_cores_perc",
)  # fmt: skip
ZERO = (
    "stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce",
    "allgather_partitions", "allgather_bucket_size", "overlap_comm", "offload_param",
    "offload_optimizer", "zenflow", "sub_group_size", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_max_live_parameters",
    "stage3_max_reuse_distance", "stage3_gather_16bit_weights_on_model_save", "stage3_module_granularity_threshold",
    "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "ignore_unused_parameters",
    "round_robin_gradients", "parameter_alignment", "zero_hpz_partition_size", "zero_quantized_weights",
    "zero_quantized_nontrainable_weights", "zero_quantized_gradients", "memory_efficient_linear",
    "override_module_apply", "log_trace_cache_warnings", "leaf_module",
)  # fmt: skip
LEAF_MODULE = ("classes", "names", "name_suffixes")
ZENFLOW = (
    "topk_ratio", "select_strategy", "select_interval", "update_interval", "overlap_step", "offload", "auto_ratio",
    "full_warm_up_rounds", "pt_reserved_cores_perc", "steps_per_epoch",
)  # fmt: skip
# Of ZERO, what takes a mapping and what takes a whole number; the rest is true or false.
SECTIONS = ("offload_param", "offload_optimizer", "zenflow", "leaf_module")
NUMBERS = (
    "stage", "reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_max_live_parameters",
    "stage3_max_reuse_distance", "stage3_module_granularity_threshold", "zero_hpz_partition_size",
)  # fmt: skip
KNOWN = {
    (): TOP_LEVEL,
    ("zero_optimization",): ZERO,
    ("zero_optimization", "offload_param"): OFFLOAD_PARAM,
    ("zero_optimization", "offload_optimizer"): OFFLOAD_OPTIMIZER,
    ("zero_optimization", "leaf_module"): LEAF_MODULE,
    ("zero_optimization", "zenflow"): ZENFLOW,
}


class Problem(NamedTuple):
    """What is wrong with a strategy: the path of the key, and the reason with its remedy."""

    path: tuple[str, ...]
    reason: str


def load(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON. Raises ConfigError with file, line and column."""
    try:
        strategy = reading.read_json(path)
    except FileNotFoundError:
        raise ConfigError(
            f"deepspeed: {path}: no such file; ds_configs/README.md lists those that come with dspref"
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}:{error.colno}: deepspeed: not valid JSON: {error.msg}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"deepspeed: {path}: cannot be read: {reading.words(error)}") from None
    if not isinstance(strategy, dict):
        raise ConfigError(f"{path}:1:1: deepspeed: must hold one JSON object")
    return strategy


def problem(strategy: Mapping[str, Any], dtype: str) -> Problem | None:
    """The first reason why DeepSpeed cannot run this strategy in `dtype`, or would run it wrongly; None if it can."""
    return _unknown_key(strategy, ()) or _auto(strategy, ()) or _combination(strategy, dtype)


def _unknown_key(node: Mapping[str, Any], path: tuple[str, ...]) -> Problem | None:
    for key, value in node.items():
        if not path and key in OWNED:
            return Problem((key,), f"belongs to {OWNED[key]}; remove it from the DeepSpeed settings")
        if path in KNOWN and key not in KNOWN[path]:
            close = difflib.get_close_matches(key, KNOWN[path], n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            return Problem((*path, key), f"not a DeepSpeed key that dspref knows{hint}")
        if isinstance(value, Mapping) and (found := _unknown_key(value, (*path, key))):
            return found
    return None


def _auto(node: Mapping[str, Any], path: tuple[str, ...]) -> Problem | None:
    for key, value in node.items():
        if value == "auto":
            return Problem((*path, key), "DeepSpeed has no 'auto' of its own; give a value or remove the key")
        if isinstance(value, Mapping) and (found := _auto(value, (*path, key))):
            return found
    return None


def _combination(strategy: Mapping[str, Any], dtype: str) -> Problem | None:
    zero = strategy.get("zero_optimization", {})
    where = ("zero_optimization",)
    if not isinstance(zero, Mapping):
        return Problem(where, "must be a mapping")
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        return Problem((*where, "stage"), f"must be 0, 1, 2 or 3, not {stage!r}")
    for key, value in zero.items():
        if not _fits(key, value):
            kind = "a mapping" if key in SECTIONS else "a whole number" if key in NUMBERS else "true or false"
            return Problem((*where, key), f"must be {kind}, not {value!r}")
    for offload in ("offload_param", "offload_optimizer"):
        if (device := _device(zero, offload)) not in ("none", "cpu", "nvme"):
            return Problem((*where, offload, "device"), f"must be none, cpu or nvme, not {device!r}")
    if (zero.get("offload_optimizer") or {}).get("ratio", 1.0) != 1.0 and stage != 3:
        return Problem((*where, "offload_optimizer", "ratio"), f"below 1 needs stage 3, not {stage}")
    if stage == 0 and dtype != "float32":
        return Problem(
            (*where, "stage"),
            f"stage 0 in {dtype} starts with an empty optimizer step (wrong AdamW bias correction); use 1",
        )
    if stage == 1 and zero.get("overlap_comm"):
        return Problem(
            (*where, "overlap_comm"), "DeepSpeed cannot overlap at stage 1 with one step per global batch; use stage 2"
        )
    if _device(zero, "offload_param") != "none" and stage != 3:
        return Problem((*where, "offload_param"), f"needs stage 3, not {stage}")
    if _device(zero, "offload_optimizer") != "none" and stage == 0:
        return Problem((*where, "offload_optimizer"), "needs stage 1, 2 or 3")
    return None


def _fits(key: str, value: Any) -> bool:
    if key in SECTIONS:
        return value is None or isinstance(value, Mapping)
    if key in NUMBERS:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return whole and not isinstance(value, bool) and abs(value) < 2**63  # what DeepSpeed's own numbers hold
    return isinstance(value, bool) or (key == "overlap_comm" and value is None)


def _device(zero: Mapping[str, Any], offload: str) -> str:
    section = zero.get(offload)
    return section.get("device", "none") if isinstance(section, Mapping) else "none"


def device_of(strategy: Mapping[str, Any], offload: str) -> str:
    """none, cpu or nvme: where `offload` (offload_param, offload_optimizer) puts things."""
    return _device(strategy.get("zero_optimization", {}), offload)


def offloads_optimizer(strategy: Mapping[str, Any]) -> bool:
    return device_of(strategy, "offload_optimizer") != "none"
