"""Experts that several ranks hold between them, by DeepSpeed's AutoEP: of each layer a rank has some, whole or (under
ZeRO-3) a shard of each. What DeepSpeed 0.19.8 makes of a layer is known here alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dspref import distributed
from dspref.engine.accelerator import deepspeed
from dspref.model import expert_parallel

if TYPE_CHECKING:
    from torch import Tensor


def _layers(model: nn.Module) -> Iterator[Any]:
    return (part for part in model.modules() if getattr(part, "_is_autoep_layer", False))


def gates(model: nn.Module) -> list[nn.Module]:
    """What gives the routers' logits, by layer."""
    return [layer.router.gate for layer in _layers(model)]


def _is_spread(parameter: nn.Parameter) -> bool:
    """Whether other ranks have other experts than these."""
    return getattr(parameter, "ds_zero_placement_family", None) == "autoep_expert"


def are_spread(part: nn.Module) -> bool:
    return any(_is_spread(parameter) for parameter in part.parameters(recurse=False))


def shape_of(parameter: Any) -> torch.Size:
    """Of a weight, with what other ranks have of it."""
    shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))
    return torch.Size((shape[0] * _ranks(parameter), *shape[1:])) if _is_spread(parameter) else shape


def _ranks(parameter: Any) -> int:
    return deepspeed.comm.get_world_size(group=_group(parameter))


def _group(parameter: Any) -> Any:
    """The ranks that hold all experts of a layer between them."""
    return deepspeed.utils.groups._get_expert_parallel_group(parameter.group_name)


def apart(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The optimizer's groups, with experts that are spread in groups of their own, named as DeepSpeed asks for."""
    found = []
    for group in groups:
        own, spread = ([p for p in group["params"] if _is_spread(p) == is_spread] for is_spread in (False, True))
        found += [{**group, "params": own}] if own else []
        found += [{**group, "params": spread, "moe": True, "name": spread[0].group_name}] if spread else []  # type: ignore[attr-defined]
    return found


@torch.no_grad()
def gathered(part: Any) -> dict[str, Tensor]:
    """The experts of all ranks as transformers holds them, on the CPU of rank 0; empty elsewhere. Called on every rank."""
    found = {name: _whole(parameter) for name, parameter in part.named_parameters(recurse=False)}
    return expert_parallel.put_together(found) if distributed.world().rank == 0 else {}


def _whole(parameter: Any) -> Tensor:
    """[E, ...] of all ranks that share a layer, on the CPU of rank 0; empty elsewhere."""
    with deepspeed.zero.GatheredParameters([parameter]) if hasattr(parameter, "ds_id") else contextlib.nullcontext():
        own = parameter.detach().contiguous()
        parts = [torch.empty_like(own) for _ in range(_ranks(parameter))]
        deepspeed.comm.all_gather(parts, own, group=_group(parameter))
    return torch.cat(parts).cpu() if distributed.world().rank == 0 else own.new_empty(0)


def named_as_loaded(lm: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state under the names that transformers has."""
    if next(_layers(lm), None) is None:
        return state
    shared = expert_parallel.shared_of(lm.config)
    return {expert_parallel.as_loaded(name, shared): tensor for name, tensor in state.items()}
