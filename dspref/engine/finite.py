"""Whether the weights that a run begins with are numbers: a NaN in them would show itself as a loss many steps later."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dspref import distributed
from dspref.errors import NumericFault


def refuse_not_finite(module: nn.Module, dtype: str, source_of: Callable[[str], tuple[str, str]]) -> None:
    """Raise NumericFault, on all ranks, where a weight is NaN or infinite. `dtype`: what the weights were read as;
    `source_of`: by the name of a tensor, the key of the config and the folder that it comes from.

    Of weights in shards each rank looks at its own, of others at its share of the tensors.
    """
    bad = next((tensor for tensor, part in own_parts(module) if not is_finite(part)), None)
    if found := next((tensor for tensor in distributed.gather_objects(bad) if tensor), None):
        key, name = source_of(found)
        raise NumericFault(
            f"{key}: {name}: {found} holds NaN or infinity in {dtype}, before any step; fetch the weights again, or use "
            "another dtype"
        )


def own_parts(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, what this rank looks at) of parameters, and of the buffers that are saved with them."""
    world = distributed.world()
    kept = module.state_dict().keys()
    tensors = [*module.named_parameters(), *((name, tensor) for name, tensor in module.named_buffers() if name in kept)]
    for number, (name, tensor) in enumerate(tensors):
        shard = getattr(tensor, "ds_tensor", None)
        if shard is not None:
            # What lies behind the end of the parameter was never written.
            own = min(shard.numel(), max(0, tensor.ds_numel - world.rank * shard.ds_numel))  # type: ignore[attr-defined]
            yield name, shard.detach().view(-1)[:own]
        elif number % world.size == world.rank:
            yield name, tensor.detach()


def is_finite(tensor: Tensor) -> bool:
    """In one pass and without a copy; True of what holds no floating-point numbers."""
    if not tensor.numel() or not tensor.is_floating_point() or tensor.is_meta:
        return True
    least, most = torch.aminmax(tensor)  # both are NaN where any is
    return bool(torch.isfinite(least) and torch.isfinite(most))
