"""Weights and memory of a rank, where ZeRO-3 leaves a part of each weight on each."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from dspref import distributed
from dspref.engine import experts
from dspref.engine.accelerator import deepspeed

if TYPE_CHECKING:
    from torch import Tensor


def weight_bytes(module: nn.Module) -> tuple[int, str]:
    """Bytes of weights that this rank holds, between forwards, and the device they lie on."""
    held = [getattr(p, "ds_tensor", p) for p in module.parameters()]
    return sum(tensor.numel() * tensor.element_size() for tensor in held), held[0].device.type


def count_weights(module: nn.Module) -> int:
    """All weights of a module, those of other ranks too."""
    return sum(elements(p) for p in module.parameters())


def elements(parameter: nn.Parameter) -> int:
    """Of a weight, those on other ranks too."""
    return experts.shape_of(parameter).numel()


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, or that this rank may have of the host's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines() if Path("/proc/meminfo").exists() else []
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)
    with contextlib.suppress(OSError, ValueError):  # of a container, which may have less
        limit, used = (int((Path("/sys/fs/cgroup") / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return free // distributed.world().local_size


@torch.no_grad()
def full_state(lm: nn.Module, trained_only: bool = False) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a possibly partitioned model on the CPU of rank 0; empty elsewhere.

    `trained_only`: the parameters that have a gradient. One module is gathered at a time, so no device holds more than
    the largest of them.
    """
    state: dict[str, Tensor] = {}
    main = distributed.world().rank == 0
    for prefix, part in lm.named_modules():
        if experts.are_spread(part):
            state |= {f"{prefix}.{name}": tensor for name, tensor in experts.gathered(part).items()}
            continue
        own = {k: p for k, p in part.named_parameters(recurse=False) if p.requires_grad or not trained_only}
        partitioned = [p for p in own.values() if hasattr(p, "ds_id")]
        with deepspeed.zero.GatheredParameters(partitioned) if partitioned else contextlib.nullcontext():
            if main:
                kept = {k: b for k, b in part.named_buffers(recurse=False) if k not in part._non_persistent_buffers_set}
                for name, tensor in {**own, **({} if trained_only else kept)}.items():
                    state[f"{prefix}.{name}".lstrip(".")] = tensor.detach().to("cpu", copy=True)
    if main:
        # Tied weights were met once; give each name that the model's own state has its tensor.
        by_parameter = {id(p): state[name] for name, p in lm.named_parameters() if name in state}
        tied = lm.named_parameters(remove_duplicate=False)
        state |= {name: by_parameter[id(p)] for name, p in tied if id(p) in by_parameter}
    return experts.named_as_loaded(lm, state)
