"""The DeepSpeed settings that `test_deepspeed_keys.py` trains with, by the test: plain data, which a fast test holds against
the table of keys."""

from __future__ import annotations

from typing import Any, NamedTuple

from dspref.config import ds_keys


class Settings(NamedTuple):
    strategy: dict[str, Any]
    dtype: str = "float32"

    @property
    def stage(self) -> int:
        return self.strategy["zero_optimization"]["stage"]

    @property
    def without(self) -> dict[str, Any]:
        """The same stage, and nothing else; at 3 with weights in shards, as the model is small."""
        return zero(self.stage)["zero_optimization"]


def zero(stage: int, top: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    whole = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return {"zero_optimization": {"stage": stage, **whole, **keys}, **(top or {})}


BUCKETS = {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
SHARDED = {"use_multi_rank_bucket_allreduce": False, "round_robin_gradients": True, "parameter_alignment": True}
PRESCALED = {"prescale_gradients": True}
PREDIVIDED = {"gradient_predivide_factor": 2}
ON_HOST = {"device": "cpu", "pin_memory": False}

EXACT = {
    "0": Settings(zero(0)),
    "0 prescaled": Settings(zero(0, PRESCALED)),
    "0 predivided": Settings(zero(0, PREDIVIDED)),
    "1 in pieces": Settings(zero(1, contiguous_gradients=False, **BUCKETS, **SHARDED)),
    "1 whole, prescaled": Settings(zero(1, PRESCALED, reduce_scatter=False, round_robin_gradients=True)),
    "1 whole, predivided": Settings(zero(1, PREDIVIDED, reduce_scatter=False)),
    "1 states on the host": Settings(zero(1, offload_optimizer=ON_HOST, **BUCKETS)),
    "1 in bf16, prescaled": Settings(zero(1, PRESCALED, allgather_bucket_size=1000), "bfloat16"),
    "1 in bf16, predivided": Settings(zero(1, PREDIVIDED), "bfloat16"),
    "2 in pieces": Settings(zero(2, contiguous_gradients=False, **BUCKETS, **SHARDED)),
    "2 overlapped": Settings(zero(2, overlap_comm=True, **BUCKETS)),
    "2 whole, prescaled": Settings(zero(2, PRESCALED, reduce_scatter=False)),
    "2 whole, predivided": Settings(zero(2, PREDIVIDED, reduce_scatter=False)),
    "2 states on the host": Settings(zero(2, offload_optimizer=ON_HOST)),
    "3 in pieces": Settings(
        zero(3, contiguous_gradients=False, overlap_comm=False, reduce_bucket_size=1000, sub_group_size=1000)
    ),
    "3 whole": Settings(zero(3, reduce_scatter=False, overlap_comm=True, log_trace_cache_warnings=True)),
    "3 gathers little": Settings(
        zero(
            3, stage3_prefetch_bucket_size=1000, stage3_max_live_parameters=1000, stage3_max_reuse_distance=100,
            stage3_use_all_reduce_for_fetch_params=True,
        )
    ),
    "3 gathers one by one": Settings(zero(3, stage3_allgather_sequential=True, memory_efficient_linear=False)),
    "3 keeps some whole": Settings(
        zero(3) | {"zero_optimization": {
            "stage": 3, "stage3_param_persistence_threshold": 5000, "stage3_model_persistence_threshold": 20_000,
        }}
    ),
    "3 states on the host": Settings(zero(3, offload_optimizer=ON_HOST)),
    "3 all on the host": Settings(zero(3, offload_optimizer=ON_HOST, offload_param=ON_HOST)),
}  # fmt: skip
ROUNDED = {
    f"{stage} {kind}": Settings(zero(stage, {"communication_data_type": kind})) for stage in range(4) for kind in ["bf16"]
}
SECOND = {"3": Settings(zero(3, zero_hpz_partition_size=2))}
IN_TWO_PLACES = {"3": Settings(zero(3, sub_group_size=1000, offload_optimizer={"device": "cpu", "ratio": 0.5}))}

SHARED = {"expert_parallel": {"enabled": True, "autoep_size": 2}}
SPREAD = {
    "1 in pieces": Settings(zero(1, SHARED, **BUCKETS)),
    "1 states on the host": Settings(zero(1, SHARED, offload_optimizer=ON_HOST)),
    "2 in pieces": Settings(zero(2, SHARED, overlap_comm=True, **BUCKETS)),
    "2 states on the host": Settings(zero(2, SHARED, offload_optimizer=ON_HOST)),
    "3": Settings(zero(3, SHARED)),
    "3 in pieces": Settings(zero(3, SHARED, overlap_comm=False, reduce_bucket_size=1000, sub_group_size=1000)),
    "3 gathers little": Settings(
        zero(
            3, SHARED, stage3_prefetch_bucket_size=1000, stage3_max_live_parameters=1000, stage3_max_reuse_distance=100,
        )
    ),
    "3 all on the host": Settings(zero(3, SHARED, offload_optimizer=ON_HOST, offload_param=ON_HOST)),
}  # fmt: skip


def printed(folder: str) -> dict[str, Settings]:
    profile = {
        "enabled": True, "profile_step": 2, "module_depth": 2, "top_modules": 2, "detailed": False,
        "recompute_fwd_factor": 1.0, "output_file": f"{folder}/profile.txt",
    }  # fmt: skip
    return {
        str(stage): Settings(zero(stage, {"wall_clock_breakdown": True, "flops_profiler": profile})) for stage in range(4)
    }


TRAINED = {
    ds_keys.EXACT: EXACT,
    ds_keys.ROUNDS: ROUNDED,
    ds_keys.HPZ: SECOND,
    ds_keys.RATIO: IN_TWO_PLACES,
    ds_keys.PRINTED: printed("/run"),
    ds_keys.SPREAD: SPREAD,
}
