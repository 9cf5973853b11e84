"""The tables of what a DeepSpeed JSON may say, held against DeepSpeed's own config."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, KeysView, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", tempfile.mkdtemp())

from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

from dspref.config import strategy
from dspref.config.ds_keys import BY_PATH, KEYS, REFUSED, UNPROVEN, names_in
from dspref.config.strategy import OWNED

ROOT = Path(__file__).resolve().parents[3]


def names(model: type[BaseModel]) -> set[str]:
    """The keys of a DeepSpeed section that are not deprecated, as users write them."""
    return {
        field.alias or name
        for name, field in model.model_fields.items()
        if not (isinstance(field.json_schema_extra, Mapping) and field.json_schema_extra.get("deprecated"))
    }


class Recorded(dict):
    """A DeepSpeed config that remembers which keys it was asked for."""

    asked: set[str]

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.asked = set()

    def __copy__(self) -> Recorded:
        return self

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> KeysView[str]:
        return KeysView(self)

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()


@pytest.fixture(scope="module")
def asked() -> set[str]:
    """Top-level keys that DeepSpeed looks for in its config."""
    recorded = Recorded({"train_micro_batch_size_per_gpu": 1})
    deepspeed_config.DeepSpeedConfig(recorded)
    assert {"zero_optimization", "gradient_clipping", "bf16"} <= recorded.asked
    return recorded.asked


MODELS = {
    "zero_optimization": DeepSpeedZeroConfig,
    "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
}
READ_AS_A_DICT = {"flops_profiler": vars(DeepSpeedFlopsProfilerConfig({}))}


@pytest.mark.parametrize("section", MODELS)
def test_the_tables_name_what_deepspeed_knows(section: str) -> None:
    """Nothing that DeepSpeed lacks (it would raise), nothing deprecated, and nothing of its own left undecided: a new
    DeepSpeed that brings a key fails here until somebody decides where it belongs."""
    assert set(names_in(section)) == names(MODELS[section])


@pytest.mark.parametrize("section", READ_AS_A_DICT)
def test_the_tables_name_what_deepspeed_reads_of_a_dict(section: str) -> None:
    assert set(names_in(section)) == set(READ_AS_A_DICT[section])
    assert all(BY_PATH[f"{section}.{name}"].default == value for name, value in READ_AS_A_DICT[section].items())


def test_the_table_names_what_deepspeed_reads_of_experts() -> None:
    recorded = Recorded({"enabled": True})
    parse_autoep_config(recorded)
    assert recorded.asked == set(names_in("expert_parallel"))
    default = parse_autoep_config({"": None})
    assert all(getattr(default, name) == BY_PATH[f"expert_parallel.{name}"].default for name in ("enabled", "autoep_size"))


def test_the_top_level_table_names_what_deepspeed_reads(asked: set[str]) -> None:
    """DeepSpeed ignores an unknown top-level key without a word."""
    top = set(names_in("")) - {UNPROVEN, "sequence_parallel_size"}  # the last is read without a constant
    assert top - asked == set()
    assert asked - top - set(OWNED) == set()
    assert not top & set(OWNED)
    assert UNPROVEN not in asked


def test_no_key_is_let_through_and_refused() -> None:
    assert len(BY_PATH) == len(KEYS)
    assert not [path for path in BY_PATH for refused in REFUSED if f"{path}.".startswith(f"{refused}.")]


def test_no_table_names_what_deepspeed_has_removed() -> None:
    let_through = {path.split(".")[0] for path in BY_PATH} | {path.split(".")[1] for path in BY_PATH if "." in path}
    assert not let_through & set(deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert not set(names_in("zero_optimization")) & set(deepspeed_config._REMOVED_ZERO_CONFIG_KEYS)


@pytest.mark.parametrize("path", [path for path in BY_PATH if path.rpartition(".")[0] in MODELS])
def test_the_defaults_are_deepspeeds(path: str) -> None:
    section, _, name = path.rpartition(".")
    (field,) = (f for own, f in MODELS[section].model_fields.items() if name in (own, f.alias))
    default = field.get_default(call_default_factory=True)
    assert getattr(default, "value", default) == BY_PATH[path].default


def test_owned_keys_name_keys_that_exist() -> None:
    from dspref.config import Config

    for key, owner in OWNED.items():
        for word in owner.replace(",", " ").split():
            section, _, name = word.rstrip(".").partition(".")
            if section in Config.model_fields and name:
                assert name in Config.model_fields[section].annotation.model_fields, (key, word)  # type: ignore[union-attr]


# --------------------------------------------------------------------------------------------------------- shipped


SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))


def test_strategies_are_shipped() -> None:
    assert "zero3.json" in {path.name for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_strategy_is_accepted(path: Path) -> None:
    """By dspref in at least one dtype, and by DeepSpeed's own model; it holds nothing that other sections own."""
    shipped = strategy.load(path)
    assert any(not strategy.problems(shipped, dtype) for dtype in ("bfloat16", "float32"))
    DeepSpeedZeroConfig(**shipped.get("zero_optimization", {}))


# ---------------------------------------------------------------------------------------------------------- checks


def zero(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": keys}


def spread(stage: int = 3, **keys: Any) -> dict[str, Any]:
    return {"expert_parallel": {"enabled": True, "autoep_size": 2, **keys}, **zero(stage=stage)}


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ({}, "float32"),
        (zero(stage=0), "float32"),
        (zero(stage=1), "bfloat16"),
        (zero(stage=1, overlap_comm=False), "bfloat16"),
        (zero(stage=2, overlap_comm=True, offload_optimizer={"device": "cpu", "pin_memory": True}), "bfloat16"),
        (zero(stage=3, offload_param={"device": "none"}, offload_optimizer={"device": "none"}), "float16"),
        (zero(stage=3, offload_param={"device": "cpu"}, offload_optimizer={"device": "cpu", "ratio": 0.5}), "bfloat16"),
        (zero(stage=3, zero_quantized_weights=True, zero_hpz_partition_size=8) | {"unproven": True}, "bfloat16"),
        (zero(stage=3, zero_hpz_partition_size=8) | {"wall_clock_breakdown": True}, "bfloat16"),
        (zero(stage=2, stage3_max_live_parameters=5), "bfloat16"),  # told as the run begins
        (zero(stage=0, overlap_comm=False), "float32"),
        (zero(stage=3.0, sub_group_size=1e6), "bfloat16"),
        (zero(stage=1) | {"prescale_gradients": True, "communication_data_type": "fp32"}, "bfloat16"),
        (zero(stage=2, reduce_scatter=False) | {"gradient_predivide_factor": 4}, "float16"),
        # What DeepSpeed would do anyway may be written down at any stage.
        (zero(stage=1, stage3_prefetch_bucket_size=5e7, zero_quantized_weights=False), "bfloat16"),
    ],
)
def test_strategies_that_deepspeed_can_run_pass(given: dict[str, Any], dtype: str) -> None:
    assert not strategy.problems(given, dtype)
    DeepSpeedZeroConfig(**given.get("zero_optimization", {}))


@pytest.mark.parametrize(
    ("given", "dtype", "path", "reason"),
    [
        (zero(stge=3), "float32", "zero_optimization.stge", "did you mean 'stage'"),
        ({"zero_optimisation": {}}, "float32", "zero_optimisation", "did you mean 'zero_optimization'"),
        (
            zero(stage=3, offload_param={"devise": "cpu"}),
            "float32",
            "zero_optimization.offload_param.devise",
            "did you mean 'device'",
        ),
        (
            zero(stage=3, offload_optimizer={"max_in_cpu": 1}),
            "float32",
            "zero_optimization.offload_optimizer.max_in_cpu",
            "not a DeepSpeed key",
        ),
        (zero(stage="auto"), "float32", "zero_optimization.stage", "auto"),
        (zero(stage=3, reduce_bucket_size="auto"), "float32", "zero_optimization.reduce_bucket_size", "auto"),
        (zero(stage=2, reduce_bucket_size=-5), "float32", "zero_optimization.reduce_bucket_size", "1 or more, not -5"),
        (zero(stage=2, allgather_bucket_size=0), "float32", "zero_optimization.allgather_bucket_size", "1 or more, not 0"),
        (
            zero(stage=3, stage3_prefetch_bucket_size=-1),
            "float32",
            "zero_optimization.stage3_prefetch_bucket_size",
            "0 or more",
        ),
        ({"flops_profiler": {"enabled": "auto"}}, "float32", "flops_profiler.enabled", "auto"),
        (zero(stage=True), "float32", "zero_optimization.stage", "0, 1, 2 or 3"),
        (zero(stage="3"), "float32", "zero_optimization.stage", "0, 1, 2 or 3"),
        (zero(stage=None), "float32", "zero_optimization.stage", "0, 1, 2 or 3"),
        ({}, "bfloat16", "zero_optimization.stage", "stage 0 in bfloat16"),
        (zero(stage=0), "float16", "zero_optimization.stage", "stage 0 in float16"),
        (zero(stage=1, overlap_comm=True), "bfloat16", "zero_optimization.overlap_comm", "use stage 2"),
        (
            zero(stage=2, offload_param={"device": "cpu"}),
            "bfloat16",
            "zero_optimization.offload_param.device",
            "needs stage 3",
        ),
        (
            zero(stage=0, offload_optimizer={"device": "cpu"}),
            "float32",
            "zero_optimization.offload_optimizer.device",
            "needs stage 1, 2 or 3",
        ),
        (zero(stage=2, sub_group_size=5), "bfloat16", "zero_optimization.sub_group_size", "needs stage 3, not 2"),
        (zero(stage=3, round_robin_gradients=True), "bfloat16", "zero_optimization.round_robin_gradients", "stage 1 or 2"),
        (zero(stage=1, contiguous_gradients=False), "bfloat16", "zero_optimization.contiguous_gradients", "no effect"),
        (
            zero(stage=2, contiguous_gradients=False, offload_optimizer={"device": "cpu"}),
            "bfloat16",
            "zero_optimization.contiguous_gradients",
            "no effect with offload_optimizer",
        ),
        *(
            (
                zero(stage=stage, offload_optimizer={"device": "nvme"}),
                "bfloat16",
                "zero_optimization.offload_optimizer.device",
                "refused: states on a disk do not come back",
            )
            for stage in (2, 3)
        ),
        (
            zero(stage=3, offload_param={"device": "nvme"}),
            "bfloat16",
            "zero_optimization.offload_param.device",
            "refused: weights that go to a disk",
        ),
        (
            zero(stage=3, offload_optimizer={"device": "cpu", "pipeline_read": True}),
            "bfloat16",
            "zero_optimization.offload_optimizer.pipeline_read",
            "use device: cpu",
        ),
        (
            zero(stage=3, offload_param={"device": "none", "pin_memory": False}),
            "bfloat16",
            "zero_optimization.offload_param.pin_memory",
            "without offload_param.device: cpu",
        ),
        (
            zero(stage=3, stage3_allgather_sequential=True, stage3_prefetch_bucket_size=1),
            "bfloat16",
            "zero_optimization.stage3_prefetch_bucket_size",
            "without stage3_allgather_sequential: false",
        ),
        (
            zero(stage=3, zero_hpz_partition_size=8, offload_optimizer={"device": "cpu"}),
            "bfloat16",
            "zero_optimization.zero_hpz_partition_size",
            "remove one",
        ),
        (
            zero(stage=3, zero_quantized_weights=True),
            "bfloat16",
            "zero_optimization.zero_quantized_weights",
            "unproven: true",
        ),
        (
            zero(stage=2, zero_quantized_weights=True),
            "bfloat16",
            "zero_optimization.zero_quantized_weights",
            "needs stage 3",
        ),
        (zero(stage=2, reduce_bucket_size=10**400), "bfloat16", "zero_optimization.reduce_bucket_size", "1 or more"),
        (zero(stage=3, sub_group_size=float("nan")), "bfloat16", "zero_optimization.sub_group_size", "1 or more"),
        (zero(stage=3) | {"unproven": True}, "bfloat16", "unproven", "remove it"),
        (zero(stage=3) | {"unproven": "yes"}, "bfloat16", "unproven", "true or false"),
        (zero(stage=2) | {"prescale_gradients": True}, "bfloat16", "prescale_gradients", "without reduce_scatter: false"),
        (
            zero(stage=3, reduce_scatter=False) | {"gradient_predivide_factor": 2},
            "bfloat16",
            "gradient_predivide_factor",
            "number of ranks",
        ),
        (zero(stage=2) | {"communication_data_type": "float"}, "bfloat16", "communication_data_type", "bf16 or fp32"),
        (zero(stage=2) | {"flops_profiler": {"enabled": 1}}, "bfloat16", "flops_profiler.enabled", "true or false"),
        (zero(stage=2) | {"flops_profiler": {"top_modules": 2}}, "bfloat16", "flops_profiler.top_modules", "enabled: true"),
        (zero(stage=3, leaf_module={"names": ["mlp"]}), "bfloat16", "zero_optimization.leaf_module", "refused: "),
        (zero(stage=3, zenflow={"topk_ratio": 0.1}), "bfloat16", "zero_optimization.zenflow", "refused: "),
        (
            zero(stage=3, offload_optimizer={"device": "cpu", "super_offload": True}),
            "bfloat16",
            "zero_optimization.offload_optimizer.super_offload",
            "cpu_adam",
        ),
        *(({key: {}}, "float32", key, "refused: ") for key in REFUSED if "." not in key),
        (spread(stage=0), "float32", "expert_parallel.enabled", "needs stage 1, 2 or 3"),
        (spread(autoep_size=1), "bfloat16", "expert_parallel.autoep_size", "2 or more"),
        ({"expert_parallel": {"enabled": True}, **zero(stage=3)}, "bfloat16", "expert_parallel", "set autoep_size"),
        (
            {"expert_parallel": {"autoep_size": 2}, **zero(stage=3)},
            "bfloat16",
            "expert_parallel.autoep_size",
            "enabled: true",
        ),
        (
            spread() | {"flops_profiler": {"enabled": True}},
            "bfloat16",
            "flops_profiler.enabled",
            "not been tried with expert_parallel; remove one",
        ),
        (spread(preset_model="mixtral"), "bfloat16", "expert_parallel.preset_model", "refused: follows from the model"),
        (spread(comm_backend="deepep"), "bfloat16", "expert_parallel.comm_backend", "refused: chooses kernels"),
        (
            spread() | zero(stage=3, zero_hpz_partition_size=2),
            "bfloat16",
            "zero_optimization.zero_hpz_partition_size",
            "not been tried with expert_parallel; remove one",
        ),
        ({"zero_optimization": True}, "float32", "zero_optimization", "must be a mapping"),
        ({"zero_optimization": None}, "float32", "zero_optimization", "must be a mapping"),
        *(({key: {}}, "float32", key, f"belongs to {owner}") for key, owner in OWNED.items()),
    ],
)
def test_problems_name_the_key_and_the_remedy(given: dict[str, Any], dtype: str, path: str, reason: str) -> None:
    (found,) = strategy.problems(given, dtype)
    assert ".".join(found.path) == path
    assert reason in found.reason


def test_all_problems_of_a_strategy_are_told_at_once() -> None:
    given = {
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 2, "overlap_com": True, "offload_param": {"device": "cpu"}},
    }
    assert [".".join(found.path) for found in strategy.problems(given, "bfloat16")] == [
        "bf16", "zero_optimization.overlap_com", "zero_optimization.offload_param.device",
    ]  # fmt: skip


@pytest.mark.parametrize("path", ["~/flops", "$SCRATCH/flops", "${SCRATCH}/x"])
def test_paths_that_deepspeed_would_take_as_they_stand_are_refused(path: str) -> None:
    profile = {"enabled": True, "output_file": path}
    (found,) = strategy.problems(zero(stage=3) | {"flops_profiler": profile}, "bfloat16")
    assert found.path == ("flops_profiler", "output_file") and "whole path" in found.reason


@pytest.mark.parametrize(
    "keys",
    [
        {"stage": 3, "offload_param": "cpu"},
        {"stage": 3, "offload_optimizer": {"device": "gpu"}},
        {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}},
        {"stage": 3, "overlap_comm": "maybe"},
        {"stage": 3, "stage3_prefetch_bucket_size": "lots"},
        {"stage": 3, "leaf_module": {"clases": []}},
        {"stage": 3, "zenflow": {"topk": 1}},
    ],
    ids=str,
)
def test_what_deepspeeds_own_model_refuses_is_refused_here(keys: dict[str, Any]) -> None:
    """Or a user's mistake ends in DeepSpeed's traceback, after the model was loaded."""
    with pytest.raises(ValidationError):
        DeepSpeedZeroConfig(**keys)
    assert strategy.problems(zero(**keys), "float32")


def test_a_strategy_without_a_gradient_norm_is_refused() -> None:
    """`grad_norm` is in every line of metrics, and clipping needs it."""
    assert strategy.problems(zero(stage=2, compute_grad_norm=False), "bfloat16")


def test_offloads_optimizer() -> None:
    assert strategy.offloads_optimizer(zero(stage=2, offload_optimizer={"device": "cpu"}))
    assert not strategy.offloads_optimizer(zero(stage=2, offload_optimizer={"device": "none"}))
    assert not strategy.offloads_optimizer(zero(stage=2, offload_optimizer={}))
    assert not strategy.offloads_optimizer({})


def test_load_reads_json(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps(zero(stage=2)))
    assert strategy.load(tmp_path / "s.json") == zero(stage=2)
