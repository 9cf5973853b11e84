"""BEMA: a reference that is the bias-corrected exponential moving average of the policy (Block and Zhang 2025,
arXiv:2508.00180): smoothed as an EMA is, and without its lag."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dspref import distributed
from dspref.config import BemaSection
from dspref.reference.moving import Sides


def weights_at(step: int, section: BemaSection) -> tuple[float, float]:
    """(alpha_t, beta_t) of optimizer step t, both within (0, 1]:

    (1)  alpha_t = (lag + multiplier t)^-bias_power
    (2)  beta_t = max((lag + multiplier t)^-ema_power, min_ema_multiplier)
    """
    age = section.lag + section.multiplier * step
    return age**-section.bias_power, max(age**-section.ema_power, section.min_ema_multiplier)


class Bema:
    """A `Rule`. theta_t is the policy as its forward has it after step t, theta_0 and EMA_0 what it was after step
    `update_after`. After every `update_freq` steps from there on, in fp32,

    (3)  EMA_t = (1 - beta_t) EMA_t' + beta_t theta_t      t': of the update before
    (4)  reference = EMA_t + alpha_t (theta_t - theta_0)   every `ref_model_update_freq` steps

    Until (4) is first due the reference is what it was at the beginning. EMA (fp32) and theta_0 (in the policy's type, in
    which it is exact) are in host memory.
    """

    def __init__(self, sides: Sides, section: BemaSection) -> None:
        """The policy is as it is before step 1."""
        self._sides, self._section = sides, section
        self._theta_0: dict[str, Tensor] = {}
        self._ema: dict[str, Tensor] = {}
        if section.update_after == 0:
            self._begin()
        size = sum(sides.of_reference(name).numel() * (4 + sides.of_policy(name).element_size()) for name in sides)
        whole = distributed.world().size > 1 and not sides.in_shards
        less = "; reference.zero_stage: 3 divides it among the ranks" if whole else ""
        distributed.log(f"reference: BEMA keeps {size / 2**20:,.1f} MiB beside it per rank, on cpu{less}")

    @torch.no_grad()
    def follow(self, step: int) -> None:
        section, since = self._section, step - self._section.update_after
        if since < 0:
            return
        # The step at which it is due may have been skipped, with the policy left as it was.
        if not self._theta_0:
            self._begin()
        elif since % section.update_freq == 0:
            self._update(*weights_at(step, section), moves=since % section.moves_every == 0)

    def _begin(self) -> None:
        """(theta_0, EMA_0): the policy of now."""
        for name in self._sides:
            self._theta_0[name] = self._sides.of_policy(name).detach().to("cpu", copy=True)
            self._ema[name] = self._theta_0[name].to(torch.float32, copy=True)

    def _update(self, alpha: float, beta: float, moves: bool) -> None:
        for name, ema in self._ema.items():
            theta = self._sides.of_policy(name).to("cpu", torch.float32)
            ema.lerp_(theta, beta)
            if moves:
                self._sides.of_reference(name).copy_(ema + alpha * (theta - self._theta_0[name].float()))
                self._sides.publish(name)

    def held(self) -> Mapping[str, Tensor]:
        """The reference beside EMA and theta_0, as these and a later policy do not give it back."""
        reference = {name: self._sides.of_reference(name) for name in self._sides}
        history = {"ema": self._ema, "theta_0": self._theta_0}
        return reference | {f"{kind}/{name}": part for kind, parts in history.items() for name, part in parts.items()}

    def make_room(self, saved: set[str]) -> None:
        if not self._theta_0 and any(name.startswith("theta_0/") for name in saved):
            self._begin()  # only the room is wanted

    def publish(self) -> None:
        for name in self._sides:
            self._sides.publish(name)
