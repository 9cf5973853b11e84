"""What a DeepSpeed JSON may say in dspref: how memory and communication are laid out, and nothing else.

DeepSpeed ignores unknown top-level keys and turns `"auto"` into a default without a word, so both are refused here.
Loads neither torch nor deepspeed; a test holds the tables against DeepSpeed's own.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
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
LEAST: dict[str, int] = dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size", "sub_group_size"), 1)  # of others 0
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


def problems(strategy: Mapping[str, Any], dtype: str) -> list[Problem]:
    """Why DeepSpeed cannot run this strategy in `dtype`, or would run it wrongly, one for each key; none if it can."""
    found = [*_unknown_keys(strategy, ()), *_misread_values(strategy, ())]
    # Whoever misspelt what combinations hang on is not told that it is missing.
    meant = {(*problem.path[:-1], _close(problem.path)) for problem in found}
    if not meant & {("zero_optimization",), ("zero_optimization", "stage")}:
        known = {problem.path for problem in found}
        found += [problem for problem in _combinations(strategy, dtype) if problem.path not in known]
    return found


def _unknown_keys(node: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[Problem]:
    for key, value in node.items():
        here = (*path, key)
        if not path and key in OWNED:
            yield Problem((key,), f"belongs to {OWNED[key]}; remove it from the DeepSpeed settings")
        elif path in KNOWN and key not in KNOWN[path]:
            close = _close(here)
            yield Problem(here, "not a DeepSpeed key that dspref knows" + (f"; did you mean '{close}'?" if close else ""))
        elif isinstance(value, Mapping):
            yield from _unknown_keys(value, here)


def _close(path: tuple[str, ...]) -> str | None:
    """The key that the last one of a path is a misspelling of."""
    known = KNOWN.get(path[:-1], ())
    return next(iter(difflib.get_close_matches(path[-1], known, n=1, cutoff=0.8)), None) if path[-1] not in known else None


def _misread_values(node: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[Problem]:
    for key, value in node.items():
        if not path and key in OWNED:
            continue  # to be removed as a whole
        if value == "auto":
            yield Problem((*path, key), "DeepSpeed has no 'auto' of its own; give a value or remove the key")
        elif isinstance(value, str) and (value.startswith("~") or "$" in value):
            yield Problem((*path, key), f"DeepSpeed expands neither ~ nor variables; write the whole path, not {value!r}")
        elif isinstance(value, Mapping):
            yield from _misread_values(value, (*path, key))


def _combinations(strategy: Mapping[str, Any], dtype: str) -> Iterator[Problem]:
    zero = strategy.get("zero_optimization", {})
    where = ("zero_optimization",)
    if not isinstance(zero, Mapping):
        yield Problem(where, "must be a mapping")
        return
    for key, value in zero.items():
        if key != "stage" and key in ZERO and not _fits(key, value):
            least = f"a whole number, {LEAST.get(key, 0)} or more"
            kind = "a mapping" if key in SECTIONS else least if key in NUMBERS else "true or false"
            yield Problem((*where, key), f"must be {kind}, not {value!r}")
    devices = {offload: _device(zero, offload) for offload in ("offload_param", "offload_optimizer")}
    for offload, device in devices.items():
        if device not in ("none", "cpu", "nvme"):
            yield Problem((*where, offload, "device"), f"must be none, cpu or nvme, not {device!r}")
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        yield Problem((*where, "stage"), f"must be 0, 1, 2 or 3, not {stage!r}")
        return
    optimizer = zero.get("offload_optimizer")
    if isinstance(optimizer, Mapping) and optimizer.get("ratio", 1.0) != 1.0 and stage != 3:
        yield Problem((*where, "offload_optimizer", "ratio"), f"below 1 needs stage 3, not {stage}")
    if stage == 0 and dtype != "float32":
        yield Problem(
            (*where, "stage"),
            f"stage 0 in {dtype} starts with an empty optimizer step (wrong AdamW bias correction); use 1",
        )
    if stage == 1 and zero.get("overlap_comm") is True:
        yield Problem(
            (*where, "overlap_comm"), "DeepSpeed cannot overlap at stage 1 with one step per global batch; use stage 2"
        )
    if devices["offload_param"] in ("cpu", "nvme") and stage != 3:
        yield Problem((*where, "offload_param"), f"needs stage 3, not {stage}")
    if devices["offload_optimizer"] in ("cpu", "nvme") and stage == 0:
        yield Problem((*where, "offload_optimizer"), "needs stage 1, 2 or 3")


def _fits(key: str, value: Any) -> bool:
    if key in SECTIONS:
        return value is None or isinstance(value, Mapping)
    if key in NUMBERS:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return whole and not isinstance(value, bool) and LEAST.get(key, 0) <= value < 2**63  # what DeepSpeed's own hold
    return isinstance(value, bool) or (key == "overlap_comm" and value is None)


def _device(zero: Mapping[str, Any], offload: str) -> str:
    section = zero.get(offload)
    return section.get("device", "none") if isinstance(section, Mapping) else "none"


def stage_of(strategy: Mapping[str, Any]) -> int:
    """Of ZeRO."""
    return strategy.get("zero_optimization", {}).get("stage", 0)


def device_of(strategy: Mapping[str, Any], offload: str) -> str:
    """none, cpu or nvme: where `offload` (offload_param, offload_optimizer) puts things."""
    return _device(strategy.get("zero_optimization", {}), offload)


def offloads_optimizer(strategy: Mapping[str, Any]) -> bool:
    return device_of(strategy, "offload_optimizer") != "none"
