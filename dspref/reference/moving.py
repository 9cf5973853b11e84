"""What every reference that follows the policy shares: which weights of the two belong together, how a new value reaches the
forward, and how all that decides the next move is saved and read back.

Every rank moves the part of the weights that it holds; nothing is gathered and no rank talks to another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dspref import distributed
from dspref.errors import ConfigError


class Sides:
    """The weights of policy and reference by their names, of each the part that this rank holds of the reference's."""

    def __init__(self, policy: nn.Module, reference: nn.Module, key: str) -> None:
        """`key`: of the config, that lets the reference move. Raises ConfigError where the two are not of one
        architecture."""
        self.reference = reference
        ours, theirs = dict(policy.named_parameters()), dict(reference.named_parameters())
        shapes, others = ({name: _whole_shape(p) for name, p in own.items()} for own in (ours, theirs))
        if different := sorted({*shapes.items()} ^ {*others.items()}):
            raise ConfigError(f"{key}: {different[0][0]} is not alike in policy and reference, which cannot be mixed")
        self._pairs = {name: (p, theirs[name]) for name, p in ours.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    @property
    def in_shards(self) -> bool:
        return any(hasattr(r, "ds_tensor") for _, r in self._pairs.values())

    def of_policy(self, name: str) -> Tensor:
        """Of the policy's parameter, what corresponds to this rank's part of the reference's."""
        return _part_like(*self._pairs[name])

    def of_reference(self, name: str) -> Tensor:
        return _own_part(self._pairs[name][1])

    def publish(self, name: str) -> None:
        """Let the next forward see the new value."""
        r: Any = self._pairs[name][1]
        # ZeRO-3 keeps small parameters gathered between forwards: such a copy is of the old value.
        if hasattr(r, "ds_tensor") and r.ds_status.name == "AVAILABLE":
            r.partition()


class Rule(Protocol):
    """How a reference follows the policy."""

    def follow(self, step: int) -> None:
        """Move, where that is due after optimizer step `step`, which has been applied."""
        ...

    def held(self) -> Mapping[str, Tensor]:
        """This rank's part of all that the next moves and forwards depend on, to be read and written."""
        ...

    def make_room(self, saved: set[str]) -> None:
        """Hold all that a checkpoint with these names is to be read into."""
        ...

    def publish(self) -> None:
        """Let the next forward see what is held."""
        ...


@dataclass(frozen=True)
class MovingReference:
    """A reference that moves after the policy's steps. What its rule holds is saved with every checkpoint."""

    sides: Sides
    rule: Rule

    def follow(self, step: int) -> None:
        self.rule.follow(step)

    def save(self, folder: Path) -> list[Path]:
        """Write this rank's part; where each holds the whole, rank 0 alone writes. The files of this rank."""
        rank = distributed.world().rank
        if not self.sides.in_shards and rank != 0:
            return []
        path = folder / (f"reference-rank-{rank}.safetensors" if self.sides.in_shards else "reference.safetensors")
        save_file({name: part.detach().contiguous() for name, part in self.rule.held().items()}, path)
        return [path]

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read back this rank's part of what `save` wrote, on any number of ranks."""
        saved = folder / "reference.safetensors"
        with ExitStack() as stack:
            paths = [saved] if saved.exists() else sorted(folder.glob("reference-rank-*.safetensors"), key=_rank_of)
            files: list[Any] = [stack.enter_context(safe_open(path, "pt")) for path in paths]
            self.rule.make_room({*files[0].keys()})
            for name, part in self.rule.held().items():
                whole = torch.cat([file.get_tensor(name).flatten() for file in files])
                start = part.numel() * distributed.world().rank if self.sides.in_shards else 0
                own = whole[start : start + part.numel()]
                # Beyond the end of a parameter its last shard holds anything.
                part.view(-1)[: own.numel()].copy_(own)
        self.rule.publish()


def _rank_of(path: Path) -> int:
    return int(path.stem.removeprefix("reference-rank-"))


def _own_part(parameter: Any) -> Tensor:
    """What this rank holds of a parameter: its shard under ZeRO-3, else all of it."""
    return parameter.ds_tensor.data if hasattr(parameter, "ds_tensor") else parameter.data


def _part_like(p: Any, r: Any) -> Tensor:
    """Of the policy's parameter `p`, what corresponds to this rank's part of `r`."""
    if hasattr(p, "ds_tensor") or not hasattr(r, "ds_tensor"):
        return _own_part(p)
    # Shards are equal parts of the flattened parameter, the last one filled up.
    size, start = r.ds_tensor.numel(), r.ds_tensor.numel() * distributed.world().rank
    held = p.data.flatten()[start : start + size]
    return torch.cat([held, held.new_zeros(size - held.numel())])


def _whole_shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
