"""TR-DPO: a reference that follows the policy (Gorbatovski et al. 2024, arXiv:2404.09656), softly, or with
alpha = 1 at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dspref.reference.moving import MovingReference


class TrustRegion(MovingReference):
    """reference <- alpha x policy + (1 - alpha) x reference, in fp32 whatever the two are computed in."""

    def __init__(self, policy: nn.Module, reference: nn.Module, alpha: float, sync_steps: int) -> None:
        """Raises ConfigError where the two are not of one architecture."""
        super().__init__(policy, reference, "reference.sync_ref_model")
        self._alpha, self._sync_steps = alpha, sync_steps
        # In 16 bits small moves would be rounded away: the reference keeps masters, as the policy's optimizer does.
        self._masters = {
            name: self._of_reference(name).float() for name in self._pairs if self._of_reference(name).dtype != torch.float32
        }

    def follow(self, step: int) -> None:
        if step % self._sync_steps == 0:
            self.sync()

    @torch.no_grad()
    def sync(self) -> None:
        for name in self._pairs:
            master = self._master(name)
            master.lerp_(self._of_policy(name).to(master.device, torch.float32), self._alpha)
            self._publish(name)

    def held(self) -> Mapping[str, Tensor]:
        return {name: self._master(name) for name in self._pairs}

    def _master(self, name: str) -> Tensor:
        return self._masters[name] if name in self._masters else self._of_reference(name)

    def _publish(self, name: str) -> None:
        if name in self._masters:
            self._of_reference(name).copy_(self._masters[name])
        super()._publish(name)
