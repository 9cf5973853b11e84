"""Inputs of layers in host memory, from a layer's forward pass until its recomputation (`gradient_checkpointing: offload`).

With checkpoints alone, a device holds a vector for each token and layer: what grows with the length of a pair once
everything else is chunked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


def move_out(lm: nn.Module) -> Moved:
    """Have every layer of a model whose checkpoints are turned on keep its input in host memory."""
    moved = Moved()
    part: Any
    for part in lm.modules():
        checkpoint = getattr(part, "_gradient_checkpointing_func", None)
        if checkpoint is not None and getattr(part, "gradient_checkpointing", False):
            part._gradient_checkpointing_func = _moving(checkpoint, moved)
    return moved


@dataclass
class _Away:
    """A tensor that is in host memory."""

    copy: Tensor
    device: torch.device
    there: Any = None
    """The event after which the copy is whole, of a GPU's."""


@dataclass
class Moved:
    """What was moved, and what is on its way.

    A tensor stays until its copy is whole and the compute stream knows it: memory that is given back earlier would be
    written over, and to leave that to `record_stream` would keep all inputs of a forward pass, as the CPU is a whole pass
    ahead of the GPU.
    """

    count: int = 0
    leaving: list[tuple[Tensor, Any]] = field(default_factory=list)
    streams: dict[torch.device, Any] = field(default_factory=dict)

    def pack(self, tensor: Tensor) -> _Away:
        self.count += 1
        if not tensor.is_cuda:
            return _Away(tensor.clone(), tensor.device)
        self.settle(tensor.device)
        if tensor.device not in self.streams:
            self.streams[tensor.device] = torch.cuda.Stream(tensor.device)
        aside = self.streams[tensor.device]
        aside.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(aside):
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            copy.copy_(tensor, non_blocking=True)
            there = aside.record_event()
        self.leaving.append((tensor, there))
        return _Away(copy, tensor.device, there)

    def unpack(self, away: _Away) -> Tensor:
        if away.there is None:
            return away.copy
        self.settle(away.device)
        torch.cuda.current_stream(away.device).wait_event(away.there)
        return away.copy.to(away.device, non_blocking=True)

    def settle(self, device: torch.device) -> None:
        """What is computed from here on comes behind the copies that were begun."""
        for _, there in self.leaving:
            torch.cuda.current_stream(device).wait_event(there)
        self.leaving.clear()


def _moving(checkpoint: Callable[..., Any], moved: Moved) -> Callable[..., Any]:
    """The same checkpoint, whose first argument, a layer's input, is moved; what layers have in common stays, such as an
    encoder's output."""

    def run(function: Callable[..., Any], hidden: Tensor, *others: Any, **options: Any) -> Any:
        def pack(tensor: Tensor) -> Tensor | _Away:
            # Of what is saved this has another object, in the same place.
            return moved.pack(tensor) if tensor.data_ptr() == hidden.data_ptr() else tensor

        def unpack(kept: Tensor | _Away) -> Tensor:
            return moved.unpack(kept) if isinstance(kept, _Away) else kept

        # The checkpoint has hooks of its own for what is saved within the layer, so these see its arguments alone.
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return checkpoint(function, hidden, *others, **options)

    return run
