"""Hidden states and LM head -> log-probs of the scored tokens, in fp32, without a (tokens x vocabulary) matrix.

C scored tokens, d hidden size, V vocabulary, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dspref.objectives import PairLogps

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

# fp32 logits alive at once, whatever the batch and the vocabulary: 128 MB feed a GPU, 16 MB stay near a CPU's caches.
LOGITS_PER_CHUNK = 2**25
LOGITS_PER_CPU_CHUNK = 2**22


@dataclass(frozen=True)
class HeadTransform:
    """What a family does to its logits after the matrix product: multiply by `scale`, then softcap x tanh(z / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Float[Tensor, "c V"]) -> Float[Tensor, "c V"]:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def derivative(self, transformed: Float[Tensor, "c V"]) -> Float[Tensor, "c V"] | float:
        """d transformed / d raw: s (1 - (z / softcap)^2) at the capped logit z."""
        return self.scale if self.softcap is None else self.scale * (1 - (transformed / self.softcap) ** 2)


def scored_logps(
    hidden: Float[Tensor, "C d"],
    weight: Float[Tensor, "V d"],
    bias: Float[Tensor, "V"] | None,
    targets: Int[Tensor, "C"],
    transform: HeadTransform = HeadTransform(),
) -> tuple[Float[Tensor, "C"], Float[Tensor, "C"]]:
    """log p(target) at each position, and the mean over the vocabulary of its logits (without gradient), both fp32.

    Logits are made chunk by chunk, and made again in the backward pass. `weight` and `bias` are read once: under ZeRO-3
    they must be the parameters themselves, read inside the forward of the module that the engine wraps.
    """
    return _ScoredLogps.apply(hidden, weight, bias, targets, transform)  # type: ignore[return-value]


def pair_logps(logps: Float[Tensor, "C"], span_index: Int[Tensor, "C"], num_pairs: int) -> PairLogps:
    """Sums and counts of the scored tokens of each answer. `span_index` = side x P + pair, sides chosen and rejected."""
    sums = logps.new_zeros(2 * num_pairs).index_add(0, span_index, logps).view(2, num_pairs)
    return PairLogps(sums[0], sums[1], *scored_tokens(span_index, num_pairs))


def scored_tokens(span_index: Int[Tensor, "C"], num_pairs: int) -> tuple[Int[Tensor, "P"], Int[Tensor, "P"]]:
    """Numbers of scored tokens of the chosen and of the rejected answers."""
    # Not bincount, which would wait for the GPU.
    counts = span_index.new_zeros(2 * num_pairs).index_add(0, span_index, torch.ones_like(span_index)).view(2, num_pairs)
    return counts[0], counts[1]


class _ScoredLogps(torch.autograd.Function):
    """log softmax at the targets with recomputation: d logp / d logit_v = [v = target] - p_v."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: HeadTransform
    ) -> tuple[Tensor, Tensor]:
        count = hidden.shape[0]
        logps = hidden.new_empty(count, dtype=torch.float32)
        log_normalizer = torch.empty_like(logps)
        mean_logit = torch.empty_like(logps)
        if transform.softcap is None:
            # The mean of h . w over the vocabulary is h . mean(w): one pass over the head instead of one over all logits.
            mean_bias = 0.0 if bias is None else bias.float().mean()
            mean_logit = transform.scale * (hidden.float() @ weight.mean(dim=0, dtype=torch.float32) + mean_bias)
        for rows in _chunks(hidden, weight):
            logits = transform(_raw_logits(hidden[rows], weight, bias))
            log_normalizer[rows] = torch.logsumexp(logits, dim=-1)
            logps[rows] = logits.gather(-1, targets[rows, None])[:, 0] - log_normalizer[rows]
            if transform.softcap is not None:
                mean_logit[rows] = logits.mean(dim=-1)
        ctx.save_for_backward(hidden, weight, bias, targets, log_normalizer)
        ctx.transform = transform
        ctx.mark_non_differentiable(mean_logit)
        return logps, mean_logit

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, targets, log_normalizer = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        # Chunks add up in fp32: in bf16 a sum over many chunks would lose the small ones.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        for rows in _chunks(hidden, weight):
            logits = ctx.transform(_raw_logits(hidden[rows], weight, bias))
            outer = ctx.transform.derivative(logits) * grad_logps[rows, None]
            grad = logits.sub_(log_normalizer[rows, None]).exp_().neg_()
            grad.scatter_add_(-1, targets[rows, None], torch.ones_like(grad[:, :1]))
            grad = grad.mul_(outer).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.t() @ hidden[rows]
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0, dtype=torch.float32)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def _raw_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(hidden, weight, bias).float()


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    count = hidden.shape[0]
    size = max(1, (LOGITS_PER_CPU_CHUNK if hidden.is_cpu else LOGITS_PER_CHUNK) // weight.shape[0])
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]
