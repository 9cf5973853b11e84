"""The keys of DeepSpeed's settings: which dspref lets through, where DeepSpeed reads them, what each is for and which test
trains with it; and which it refuses, with the reason. For DeepSpeed 0.19.8. Loads neither torch nor deepspeed.

The tables of docs/deepspeed.md are written from these (`python docs/make_ds_keys.py`); tests hold them against the defaults
of DeepSpeed and against the settings that are trained.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

EXACT = "test_deepspeed_keys.py::test_a_key_leaves_the_numbers_as_they_are"
ROUNDS = "test_deepspeed_keys.py::test_a_type_of_communication_rounds_and_learns"
HPZ = "test_deepspeed_keys.py::test_second_shards_leave_the_numbers_as_they_are"
RATIO = "test_deepspeed_keys.py::test_states_in_two_places_leave_the_numbers_as_they_are"
PRINTED = "test_deepspeed_keys.py::test_what_deepspeed_prints_of_a_step"
SPREAD = "test_expert_parallel.py::test_spread_experts_leave_the_numbers_as_they_are"


class Key(NamedTuple):
    """What is known of a key that is let through."""

    path: str
    """Dotted, from the top of the settings."""
    default: Any
    """DeepSpeed's own. Who writes it asks for nothing, which is right everywhere."""
    stages: str
    """Of ZeRO, at which DeepSpeed reads the key."""
    gain: str
    """What it is for."""
    test: str = EXACT
    """The test that trains with it; none where a single machine without GPUs cannot."""
    exact: bool = True
    """Whether the numbers of a run stay as they are without the key."""
    needs: tuple[str, Any] | None = None
    """Another key and its value, without which DeepSpeed does not look at this one."""
    takes: str = ""
    """What a value has to be, where the default does not tell."""
    least: float = 0
    most: float = 2**63 - 1


ZERO = "zero_optimization"
PARAM, OPTIMIZER = f"{ZERO}.offload_param", f"{ZERO}.offload_optimizer"
WHOLE_REDUCTION = f"{ZERO}.reduce_scatter", False
PROFILED = "flops_profiler.enabled", True
EXPERTS = "expert_parallel"

KEYS = (
    # How gradients travel.
    Key(f"{ZERO}.stage", 0, "0123", "less memory: 1 shards states, 2 gradients, 3 weights"),
    Key(f"{ZERO}.contiguous_gradients", True, "123", "false: no buffer for gradients, more holes in memory"),
    Key(f"{ZERO}.reduce_scatter", True, "123", "false: whole gradients travel; more traffic, rarely of use"),
    Key(f"{ZERO}.reduce_bucket_size", 500_000_000, "123", "smaller: less memory, more calls", least=1),
    Key(
        f"{ZERO}.use_multi_rank_bucket_allreduce", True, "12", "false: a reduction for each rank, for large shards",
        needs=(f"{ZERO}.reduce_scatter", True),
    ),
    Key(f"{ZERO}.allgather_bucket_size", 500_000_000, "12", "smaller: less memory, more calls", least=1),
    Key(
        f"{ZERO}.overlap_comm", None, "23", "gradients travel while others are computed; more memory",
        takes="true or false",
    ),
    Key(f"{ZERO}.round_robin_gradients", False, "12", "ranks copy gradients to the host side by side"),
    Key(f"{ZERO}.parameter_alignment", False, "12", "weights begin at 16 bytes, which some kernels ask for"),
    Key(
        "communication_data_type", None, "0123", "fp16, bf16: half the traffic of fp32 gradients; fp32: sums of bf16 ones "
        "round less", ROUNDS, exact=False, takes="fp16, bf16 or fp32",
    ),
    Key(
        "prescale_gradients", False, "012", "fp16 gradients of many ranks do not overflow as they add up",
        needs=WHOLE_REDUCTION,
    ),
    Key(
        "gradient_predivide_factor", 1.0, "012", "as prescale_gradients, in two halves", needs=WHOLE_REDUCTION,
        takes="a number above 0", least=sys.float_info.min,
    ),
    # Where states and weights are.
    Key(
        f"{OPTIMIZER}.device", "none", "123", "room on the GPU for the optimizer's states: 12 bytes a weight",
        takes="none or cpu",
    ),
    Key(
        f"{OPTIMIZER}.pin_memory", True, "123", "false: where pages may not be locked; slower copies",
        needs=(f"{OPTIMIZER}.device", "cpu"),
    ),
    Key(
        f"{OPTIMIZER}.ratio", 1.0, "3", "below 1: a share of the states stays on the GPU, where there is room", RATIO,
        needs=(f"{OPTIMIZER}.device", "cpu"), most=1,
    ),
    Key(
        f"{PARAM}.device", "none", "3", "room on the GPU for the weights: each layer crosses the bus twice a step",
        takes="none or cpu",
    ),
    Key(
        f"{PARAM}.pin_memory", True, "3", "false: where pages may not be locked; slower copies",
        needs=(f"{PARAM}.device", "cpu"),
    ),
    # How stage 3 gathers weights.
    Key(f"{ZERO}.sub_group_size", 1_000_000_000, "3", "smaller: less memory during the update", least=1),
    Key(
        f"{ZERO}.stage3_prefetch_bucket_size", 50_000_000, "3", "larger: weights come earlier; more memory",
        needs=(f"{ZERO}.stage3_allgather_sequential", False),
    ),
    Key(f"{ZERO}.stage3_param_persistence_threshold", 100_000, "3", "larger: small weights stay whole; fewer gathers"),
    Key(f"{ZERO}.stage3_model_persistence_threshold", sys.maxsize, "3", "the most that stays whole of all weights"),
    Key(f"{ZERO}.stage3_max_live_parameters", 1_000_000_000, "3", "smaller: less memory, more gathers"),
    Key(f"{ZERO}.stage3_max_reuse_distance", 1_000_000_000, "3", "smaller: less memory, more gathers"),
    Key(
        f"{ZERO}.stage3_use_all_reduce_for_fetch_params", False, "3", "gathers without copies on the host; more traffic",
        needs=(f"{ZERO}.stage3_allgather_sequential", False),
    ),
    Key(f"{ZERO}.stage3_allgather_sequential", False, "3", "no flat buffer: less memory, more calls"),
    Key(f"{ZERO}.memory_efficient_linear", True, "3", "false: torch's own linear layer, for DeepSpeed's that saves memory"),
    Key(
        f"{ZERO}.zero_hpz_partition_size", 1, "3", "these ranks keep a second copy of the weights among them, and backward "
        "gathers inside a machine; takes 2 bytes a weight, shared by them", HPZ, least=1,
    ),
    # ZeRO++, whose kernels are for NVIDIA GPUs only.
    Key(
        f"{ZERO}.zero_quantized_weights", False, "3", "weights travel in 8 bits: half the gathers' traffic in bf16",
        "", exact=False,
    ),
    Key(
        f"{ZERO}.zero_quantized_nontrainable_weights", False, "3", "frozen weights stay in 8 bits, beside an adapter",
        "", exact=False,
    ),
    Key(
        f"{ZERO}.zero_quantized_gradients", False, "3", "gradients travel in 4 bits between machines", "", exact=False,
        needs=(f"{ZERO}.reduce_scatter", True),
    ),
    # AutoEP.
    Key(f"{EXPERTS}.enabled", False, "123", "ranks hold a layer's experts between them, and tokens travel to them", SPREAD),
    Key(
        f"{EXPERTS}.autoep_size", 1, "123", "how many ranks; divides the ranks and the experts", SPREAD,
        needs=(f"{EXPERTS}.enabled", True), least=2,
    ),
    # What is printed, by rank 0.
    Key("wall_clock_breakdown", False, "0123", "the time of each part of a step", PRINTED),
    Key("flops_profiler.enabled", False, "0123", "operations and time of each module in one step, forward only", PRINTED),
    Key("flops_profiler.profile_step", 1, "0123", "which step, counted from 0", PRINTED, needs=PROFILED),
    Key("flops_profiler.module_depth", -1, "0123", "how deep into the model", PRINTED, needs=PROFILED, least=-1),
    Key("flops_profiler.top_modules", 1, "0123", "how many modules of each depth", PRINTED, needs=PROFILED, least=1),
    Key("flops_profiler.detailed", True, "0123", "false: without the tree of modules", PRINTED, needs=PROFILED),
    Key(
        "flops_profiler.recompute_fwd_factor", 0.0, "0123", "forwards that backward repeats, for its FLOPS", PRINTED,
        needs=PROFILED,
    ),
    Key("flops_profiler.output_file", None, "0123", "a file for it", PRINTED, needs=PROFILED, takes="a path"),
    Key(f"{ZERO}.log_trace_cache_warnings", False, "3", "tells when the order of modules changed, and prefetching stops"),
)  # fmt: skip

_ELSEWHERE = "another engine than ZeRO, which dspref does not drive; remove it"
_TRAINS_OTHERWISE = "changes what is trained; remove it"
_OWN_FILES = "concerns checkpoints that DeepSpeed alone writes, and dspref writes its own; remove it"

# Seen with DeepSpeed 0.19.8, over 2 CPU ranks: a run whose states lay on a disk went on from a checkpoint with other
# moments, or with its first weights where these were small; one whose weights did (max_in_cpu: 0) ended in "already assigned
# swap buffer".
ON_DISK = {
    f"{OPTIMIZER}.device": "states on a disk do not come back from a checkpoint as they were, and nothing tells; use cpu",
    f"{PARAM}.device": "weights that go to a disk end the run, as DeepSpeed gives one of them two buffers; use cpu",
}
_OF_DISKS = "belongs to device: nvme, which is refused (a run would fail, or go on wrongly); use device: cpu"

# What DeepSpeed knows and dspref refuses on purpose. A key of a section stands for all below it.
REFUSED = {
    f"{ZERO}.zenflow": "updates some weights late and some in part, and decides itself when to step, which is not AdamW "
    "over the pairs of a step; remove it",
    f"{OPTIMIZER}.super_offload": "takes gradients only where DeepSpeed itself counts the accumulation, and keeps the "
    "moments in a process that no checkpoint sees; use device: cpu with train.optim: cpu_adam",
    f"{OPTIMIZER}.cpuadam_cores_perc": "belongs to super_offload, which dspref cannot use; set OMP_NUM_THREADS instead",
    **dict.fromkeys(
        (*(f"{OPTIMIZER}.{name}" for name in ("nvme_path", "buffer_count", "pipeline_read", "pipeline_write", "fast_init")),
         *(f"{PARAM}.{name}" for name in ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu")), "aio"),
        _OF_DISKS,
    ),
    f"{ZERO}.leaf_module": "dspref itself marks the modules with experts; of others that are marked gradients get lost, or "
    "the step fails; remove it",
    f"{ZERO}.stage3_module_granularity_threshold": "marks modules as leaf_module does, and so gradients get lost, or the "
    "step fails; remove it",
    f"{ZERO}.override_module_apply": "concerns models that are initialised at random, and dspref loads weights; remove it",
    f"{ZERO}.stage3_gather_16bit_weights_on_model_save": "has no effect, dspref gathers the weights itself; remove it",
    f"{ZERO}.allgather_partitions": "has no effect, DeepSpeed reads it nowhere any more; remove it",
    f"{ZERO}.ignore_unused_parameters": "false would end a run in which a weight gets no gradient on one rank, as in packs "
    "without images; remove it",
    f"{ZERO}.load_from_fp32_weights": _OWN_FILES,
    f"{ZERO}.elastic_checkpoint": _OWN_FILES,
    f"{ZERO}.pipeline_loading_checkpoint": _OWN_FILES,
    f"{ZERO}.legacy_stage1": "is an old implementation, which DeepSpeed itself refuses; remove it",
    f"{ZERO}.enable_sanity_checks": "is for DeepSpeed's developers; remove it",
    f"{ZERO}.save_muon_momentum_buffer_in_memory": "belongs to Muon, which dspref does not have; remove it",
    f"{ZERO}.compute_grad_norm": "without the norm there is neither clipping nor grad_norm; remove it",
    "disable_allgather": "has no effect, DeepSpeed reads it nowhere any more; remove it",
    "disable_python_gc": "nothing would collect garbage any more, and host memory would grow all run long; remove it",
    "memory_breakdown": "its reports set back the peak that perf/memory_gib tells, so dspref leaves them out; remove it",
    "dump_state": "has no effect, dspref silences what it prints; config.resolved.yaml has all settings; remove it",
    "comms_logger": "has no effect but to slow every call, nothing prints its table; use train.profile, which shows them",
    "zero_allow_untested_optimizer": "belongs to train.optim; remove it",
    "zero_force_ds_cpu_optimizer": "belongs to train.optim (cpu_adam is DeepSpeed's); remove it",
    **dict.fromkeys(
        ("data_efficiency", "curriculum_learning", "progressive_layer_drop", "sparse_attention", "compression_training",
         "quantize_training", "weight_quantization", "eigenvalue", "sparse_gradients"),
        _TRAINS_OTHERWISE,
    ),
    **dict.fromkeys(
        ("pipeline", "tensor_parallel", "hybrid_engine", "autotuning",
         "use_data_before_expert_parallelism", "seq_parallel_communication_data_type", "elasticity", "graph_harvesting",
         "compile"),
        f"belongs to {_ELSEWHERE}",
    ),
    "sequence_parallel_size": "belongs to parallel.sequence; remove it",
    **dict.fromkeys(
        (f"{EXPERTS}.{name}" for name in (
            "preset_model", "moe_layer_pattern", "expert_pattern", "router_pattern", "route_norm", "route_scale",
            "score_apply", "score_func", "top_k", "routed_scaling_factor", "expert_w1", "expert_w2", "expert_w3",
            "num_experts_attr", "top_k_attr", "has_shared_experts", "shared_experts_pattern", "shared_experts_gate_pattern",
            "expert_activation", "num_expert_groups", "num_limited_groups",
        )),
        "follows from the model's config.json, of which dspref tells DeepSpeed; remove it",
    ),
    **dict.fromkeys(
        (f"{EXPERTS}.{name}" for name in (
            "use_grouped_mm", "disable_triton_grouped_mm", "combine_impl", "row_weighting_impl", "gate_up_impl",
            "comm_backend", "comm_num_sm", "comm_qp_margin", "comm_max_tokens_per_rank", "async_split_plan",
        )),
        "chooses kernels, and no test of dspref has trained with others than DeepSpeed's own choice; remove it",
    ),
    **dict.fromkeys(
        (f"{EXPERTS}.{name}" for name in ("expert_tensor_parallel_size", "validate_folding_routing")),
        "belongs to tensor_parallel, which dspref does not drive; remove it",
    ),
    f"{EXPERTS}.load_balance_coeff": "is refused by DeepSpeed itself; use model.router_aux_loss_coef",
    **dict.fromkeys(("bfloat16",), "belongs to model.dtype; remove it"),
    **dict.fromkeys(("dataloader_drop_last", "vocabulary_size"), "belongs to data; remove it"),
    "gradient_allreduce_op": "gradients of all ranks are averaged, on which the loss is built; remove it",
    **dict.fromkeys(("comet", "log_level"), "belongs to log; remove it"),
    **dict.fromkeys(("nebula", "datastates_ckpt"), "belongs to checkpoint; remove it"),
    "timers": "waits for the GPU at every forward; metrics.jsonl has perf/* without; remove it",
}  # fmt: skip

BY_PATH = {key.path: key for key in KEYS}
# Takes its place beside `zero_optimization`; DeepSpeed does not see it.
UNPROVEN = "unproven"
# What DeepSpeed's own bf16 optimizer of stage 1 does not read.
UNREAD_IN_BF16 = tuple(
    f"{ZERO}.{name}"
    for name in (
        "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce",
        "round_robin_gradients", "parameter_alignment",
    )
)  # fmt: skip
# What has been trained with beside spread experts.
BESIDE_EXPERTS = (
    f"{EXPERTS}.enabled", f"{EXPERTS}.autoep_size", f"{ZERO}.stage", f"{ZERO}.reduce_bucket_size",
    f"{ZERO}.allgather_bucket_size", f"{ZERO}.overlap_comm", f"{ZERO}.sub_group_size", f"{OPTIMIZER}.device",
    f"{OPTIMIZER}.pin_memory", f"{PARAM}.device", f"{PARAM}.pin_memory", f"{ZERO}.stage3_prefetch_bucket_size",
    f"{ZERO}.stage3_param_persistence_threshold", f"{ZERO}.stage3_max_live_parameters",
    f"{ZERO}.stage3_max_reuse_distance",
)  # fmt: skip


def names_in(section: str) -> tuple[str, ...]:
    """The keys right below a section ("" is the top) that are let through or refused by name."""
    start = f"{section}." if section else ""
    below = [path[len(start) :].split(".")[0] for path in (*BY_PATH, *REFUSED) if path.startswith(start)]
    return tuple(dict.fromkeys([*below, *([] if section else [UNPROVEN])]))


SECTIONS = tuple(dict.fromkeys(path.rsplit(".", count)[0] for path in BY_PATH for count in range(1, path.count(".") + 1)))
