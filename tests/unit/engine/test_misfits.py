"""DeepSpeed settings that the ranks of a run cannot have, told before DeepSpeed sees them. Here: one rank, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from dspref.engine import ds_config, misfits
from dspref.errors import ConfigError, ExitCode
from dspref.ranks import sharing


def zero(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, **keys}}


def test_second_shards_are_for_ranks_that_they_divide() -> None:
    misfits.refuse(zero(zero_hpz_partition_size=1))
    with pytest.raises(ConfigError, match="zero_hpz_partition_size: 2 does not divide the 1 ranks; use 1") as caught:
        misfits.refuse(zero(zero_hpz_partition_size=2))
    assert caught.value.exit_code == ExitCode.CONFIG


@pytest.mark.parametrize("key", ["zero_quantized_weights", "zero_quantized_gradients"])
def test_what_is_quantized_is_for_gpus(key: str) -> None:
    """DeepSpeed would blame the model, or do nothing in silence."""
    misfits.refuse({"unproven": True, **zero(**{key: False})})
    with pytest.raises(ConfigError, match=f"deepspeed.zero_optimization.{key}: is for NVIDIA GPUs"):
        misfits.refuse({"unproven": True, **zero(**{key: True})})


def test_a_run_with_unproven_keys_begins_with_a_line() -> None:
    assert misfits.notes(zero(zero_hpz_partition_size=2, stage3_max_live_parameters=5)) == []
    (line,) = misfits.notes({"unproven": True, **zero(zero_quantized_weights=True, zero_quantized_gradients=True)})
    assert line.startswith("warning: ") and "trains with zero_quantized_weights, zero_quantized_gradients;" in line


def test_what_is_for_stage_3_by_its_name_is_told_at_others() -> None:
    given = zero(stage3_max_live_parameters=5, stage3_prefetch_bucket_size=5e7)
    given["zero_optimization"]["stage"] = 2
    assert misfits.notes(given) == ["deepspeed: without effect at stage 2: stage3_max_live_parameters"]


def test_deepspeed_does_not_see_that_a_key_is_unproven() -> None:
    from dspref.config import TrainSection

    given = {"unproven": True, **zero(zero_quantized_weights=True)}
    told = ds_config.training_config(given, "bfloat16", TrainSection())
    assert "unproven" not in told and told["zero_optimization"]["zero_quantized_weights"] is True
    assert given["unproven"] is True


def test_groups_that_reach_over_machines_are_told_of() -> None:
    """There is no second machine here: the line is what is looked at."""
    assert sharing.over_machines(1, 1) is sharing.over_machines(4, 8) is sharing.over_machines(8, 8) is None
    assert "a machine has 3 ranks, so that groups of 2 reach over machines" in str(sharing.over_machines(2, 3))
    assert "a machine has 1 rank, so that groups of 2" in str(sharing.over_machines(2, 1))
