"""TR-DPO: a reference that follows the policy (Gorbatovski et al. 2024, arXiv:2404.09656), softly, or with
alpha = 1 at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dspref.reference.moving import Sides


class TrustRegion:
    """A `Rule`: reference <- alpha x policy + (1 - alpha) x reference, in fp32 whatever the two are computed in."""

    def __init__(self, sides: Sides, alpha: float, sync_steps: int) -> None:
        self._sides, self._alpha, self._sync_steps = sides, alpha, sync_steps
        # In 16 bits small moves would be rounded away: the reference keeps masters, as the policy's optimizer does.
        narrow = [name for name in sides if sides.of_reference(name).dtype != torch.float32]
        self._masters = {name: sides.of_reference(name).float() for name in narrow}

    @torch.no_grad()
    def follow(self, step: int) -> None:
        if step % self._sync_steps == 0:
            for name, master in self.held().items():
                master.lerp_(self._sides.of_policy(name).to(master.device, torch.float32), self._alpha)
            self.publish()

    def held(self) -> Mapping[str, Tensor]:
        return {name: self._masters.get(name, self._sides.of_reference(name)) for name in self._sides}

    def make_room(self, saved: set[str]) -> None:
        pass

    def publish(self) -> None:
        for name in self._sides:
            if name in self._masters:
                self._sides.of_reference(name).copy_(self._masters[name])
            self._sides.publish(name)
