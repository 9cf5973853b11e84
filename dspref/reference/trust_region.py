"""TR-DPO: a reference that follows the policy (Gorbatovski et al. 2024, arXiv:2404.09656), softly, or with
alpha = 1 at once.

Every rank moves the part of the weights that it holds; nothing is gathered and no rank talks to another.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dspref import distributed
from dspref.errors import ConfigError


class MovingReference:
    """reference <- alpha x policy + (1 - alpha) x reference, in fp32 whatever the two are computed in."""

    def __init__(self, policy: nn.Module, reference: nn.Module, alpha: float) -> None:
        """Raises ConfigError where the two are not of one architecture."""
        self.reference = reference
        self._alpha = alpha
        ours, theirs = dict(policy.named_parameters()), dict(reference.named_parameters())
        shapes, others = ({name: _whole_shape(p) for name, p in own.items()} for own in (ours, theirs))
        if different := sorted({*shapes.items()} ^ {*others.items()}):
            raise ConfigError(
                f"reference.sync_ref_model: {different[0][0]} is not alike in policy and reference, which cannot be mixed"
            )
        self._pairs = {name: (p, theirs[name]) for name, p in ours.items()}
        # In 16 bits small moves would be rounded away: the reference keeps masters, as the policy's optimizer does.
        self._masters = {
            name: _own_part(r).float() for name, (_, r) in self._pairs.items() if _own_part(r).dtype != torch.float32
        }

    @torch.no_grad()
    def sync(self) -> None:
        for name, (p, r) in self._pairs.items():
            master = self._master(name)
            master.lerp_(_part_like(p, r).to(master.device, torch.float32), self._alpha)
            self._publish(name)

    def save(self, folder: Path) -> list[Path]:
        """Write this rank's part; where each holds the whole, rank 0 alone writes. The files of this rank."""
        if not self._in_shards and distributed.world().rank != 0:
            return []
        save_file({name: self._master(name).detach().contiguous() for name in self._pairs}, self._file(folder))
        return [self._file(folder)]

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read back this rank's part of what `save` wrote, on any number of ranks."""
        saved = folder / "reference.safetensors"
        with ExitStack() as stack:
            paths = [saved] if saved.exists() else sorted(folder.glob("reference-rank-*.safetensors"), key=_rank_of)
            files: list[Any] = [stack.enter_context(safe_open(path, "pt")) for path in paths]
            for name in self._pairs:
                master = self._master(name)
                whole = torch.cat([file.get_tensor(name).flatten() for file in files])
                start = master.numel() * distributed.world().rank if self._in_shards else 0
                part = whole[start : start + master.numel()]
                # Beyond the end of a parameter its last shard holds anything.
                master.view(-1)[: part.numel()].copy_(part)
                self._publish(name)

    @property
    def _in_shards(self) -> bool:
        return any(hasattr(r, "ds_tensor") for _, r in self._pairs.values())

    def _file(self, folder: Path) -> Path:
        return folder / (
            f"reference-rank-{distributed.world().rank}.safetensors" if self._in_shards else "reference.safetensors"
        )

    def _master(self, name: str) -> Tensor:
        return self._masters[name] if name in self._masters else _own_part(self._pairs[name][1])

    def _publish(self, name: str) -> None:
        """Let the next forward see the new value."""
        r: Any = self._pairs[name][1]
        if name in self._masters:
            _own_part(r).copy_(self._masters[name])
        # ZeRO-3 keeps small parameters gathered between forwards: such a copy is of the old value.
        if hasattr(r, "ds_tensor") and r.ds_status.name == "AVAILABLE":
            r.partition()


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
