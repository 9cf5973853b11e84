"""The ranks that hold packs between them, and how they speak: for `model.exchange`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dspref import distributed
from dspref.model.exchange import Group

if TYPE_CHECKING:
    from torch import Tensor

# By the number of ranks in one: making a group takes a meeting of all ranks.
_made: dict[int, Any] = {}


def group() -> Group | None:
    """This rank's group; None where each rank has packs of its own. Called on all ranks alike."""
    world = distributed.world()
    if world.sequence == 1:
        return None
    if world.sequence not in _made:
        starts = range(0, world.size, world.sequence)
        timeout = distributed.patience()
        every = [dist.new_group(list(range(start, start + world.sequence)), timeout=timeout) for start in starts]
        _made[world.sequence] = every[world.group]
    ranks = _made[world.sequence]
    return Group(world.sequence, world.part, partial(_swap, ranks), partial(_add, ranks))


def _swap(ranks: Any, rows: Tensor) -> Tensor:
    found = torch.empty_like(rows)
    dist.all_to_all_single(found, rows, group=ranks)
    return found


def _add(ranks: Any, values: Tensor) -> Tensor:
    dist.all_reduce(values, group=ranks)
    return values
