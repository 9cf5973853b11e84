"""What of a DeepSpeed strategy does not fit these ranks, told where DeepSpeed would crash or look away.

What hangs on the settings alone is told by `config.strategy`, before there are ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspref import distributed
from dspref.config import strategy
from dspref.engine.accelerator import ACCELERATOR
from dspref.errors import ConfigError
from dspref.model import expert_parallel
from dspref.ranks import sharing


def refuse(user_strategy: Mapping[str, Any]) -> None:
    """Raises ConfigError where the strategy cannot be had on these ranks. Every rank comes to the same end."""
    world = distributed.world()
    zero = user_strategy.get("zero_optimization") or {}
    second = zero.get("zero_hpz_partition_size") or 1
    if world.size % second:
        raise ConfigError(
            f"deepspeed.zero_optimization.zero_hpz_partition_size: {second} does not divide the {world.size} ranks; "
            f"use {world.local_size}, the ranks of a machine, or remove it"
        )
    sharing.refuse(world.sequence, world.size)
    refuse_spread(user_strategy, world.size)
    keys = strategy.unproven(user_strategy)
    if keys and ACCELERATOR.device_name() != "cuda":
        raise ConfigError(f"deepspeed.{keys[0]}: is for NVIDIA GPUs, and these ranks have none; remove it")
    if zero.get("zero_quantized_gradients") and world.is_one_machine:
        raise ConfigError(
            "deepspeed.zero_optimization.zero_quantized_gradients: has no effect on one machine, inside which gradients "
            "travel whole; remove it"
        )


def refuse_spread(user_strategy: Mapping[str, Any], ranks: int) -> None:
    """Raises ConfigError where the ranks cannot hold the experts between them, as there are some without others."""
    size = expert_parallel.size_of(user_strategy)
    if ranks % size:
        few = max(n for n in range(1, min(size, ranks + 1)) if ranks % n == 0)
        fix = f"use {few}" if few > 1 else "remove deepspeed.expert_parallel"
        there = f"{ranks} rank{'s' if ranks > 1 else ''}"
        raise ConfigError(
            f"deepspeed.expert_parallel.autoep_size: {size} does not divide the {there}; {fix}, or use other ranks"
        )


def notes(user_strategy: Mapping[str, Any]) -> list[str]:
    """What the user should know before the run, in lines."""
    lines = []
    if keys := strategy.unproven(user_strategy):
        lines.append(f"warning: deepspeed.unproven: no test of dspref trains with {_short(keys)}; compare the first losses")
    if expert_parallel.size_of(user_strategy) > 1 and ACCELERATOR.device_name() == "cuda":
        lines.append("warning: deepspeed.expert_parallel: tested on CPUs alone; compare the first losses with those without")
    world = distributed.world()
    if line := sharing.over_machines(world.sequence, world.local_size):
        lines.append(line)
    if keys := strategy.idle(user_strategy):
        lines.append(f"deepspeed: without effect at stage {strategy.stage_of(user_strategy)}: {_short(keys)}")
    return lines


def _short(keys: list[str]) -> str:
    return ", ".join(keys).replace("zero_optimization.", "")
