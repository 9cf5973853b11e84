"""Mixture-of-experts models: the load-balancing loss of their routers, and how evenly the experts are used.

T tokens, L layers with experts, E experts. The loss is that of Switch Transformers (Fedus et al. 2021, arXiv:2101.03961,
eq. 4-6) as transformers' `load_balancing_loss_func` has it: pooled over layers, its least value is the number of experts
per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn


class Routing(NamedTuple):
    """Sums over the tokens of a pack; those of several packs or ranks add up."""

    probabilities: Float[Tensor, "L E"]
    """Router probabilities; the only part with a gradient."""
    load: Float[Tensor, "L E"]
    """Tokens sent to each expert."""
    tokens: Float[Tensor, ""]
    """Tokens of the pack, each as often as it counts."""


class Ears:
    """Hears routers that transformers does not know, and therefore tells nothing of."""

    def __init__(self, gates: Iterable[nn.Module]) -> None:
        """`gates`: by layer, modules whose forward gives the logits [T, E]."""
        self._heard: list[Tensor] | None = None
        for gate in gates:
            gate.register_forward_hook(self._hear)

    def _hear(self, gate: Any, given: Any, logits: Tensor) -> None:
        if self._heard is not None:  # else it is recomputed for a backward
            self._heard.append(logits)

    @contextmanager
    def open(self) -> Iterator[list[Tensor]]:
        """What is said while this is open, by layer."""
        self._heard = heard = []
        try:
            yield heard
        finally:
            self._heard = None


def routing(logits: Sequence[Float[Tensor, "T E"]], top_k: int, weight: Float[Tensor, "T"]) -> Routing:
    """Sum up what the routers of all layers said of a pack, each token weighed by how often it would be computed without
    sharing (`PackedBatch.multiplicity`): not at all in a filler."""
    probabilities, load = [], []
    for layer in logits:
        chances = layer.float().softmax(dim=-1)
        chosen = chances.detach().topk(top_k, dim=-1).indices
        probabilities.append(weight @ chances)
        load.append(weight.new_zeros(layer.shape[-1]).index_add(0, chosen.flatten(), weight.repeat_interleave(top_k)))
    return Routing(torch.stack(probabilities), torch.stack(load), weight.sum())


def balance(share: Float[Tensor, "L E"], load: Float[Tensor, "L E"], load_tokens: Tensor, tokens: Tensor | int) -> Tensor:
    """E sum_i f_i P_i. f: `load` over its tokens, a constant. P: the sum of probabilities `share` over `tokens`.

    With `tokens` of the whole step, the values of its packs add up to the loss of the step.
    """
    layers, experts = load.shape
    fraction = load.sum(dim=0) / (layers * load_tokens).clamp(min=1)
    return experts * (fraction.detach() * share.sum(dim=0) / (layers * tokens)).sum()


def load_metrics(load: Float[Tensor, "L E"]) -> dict[str, float]:
    """Per layer, the load of the busiest and of the idlest expert over the mean load: 1 and 1 are even, 0 is unused."""
    relative = load / load.mean(dim=1, keepdim=True).clamp(min=1e-9)
    named = {"max": relative.amax(dim=1).tolist(), "min": relative.amin(dim=1).tolist()}
    return {f"expert_load/{which}_{layer}": value for which, values in named.items() for layer, value in enumerate(values)}
