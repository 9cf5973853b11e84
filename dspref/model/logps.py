"""Hidden states and LM head -> log-probs of the scored tokens, in fp32, without a (tokens x vocabulary) matrix.

C scored tokens, N of them counted for each pair that has them, d hidden size, V vocabulary, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dspref.data.batch import PROMPT, PackedBatch
from dspref.model import head_room
from dspref.model.head_room import PART, TILE, fits
from dspref.model.logits import (
    Extras,
    add_product,
    by_log_softmax,
    by_powers,
    kept_logit_gradient,
    logit_gradient,
    raw_logits,
)
from dspref.objectives.families import PairLogps

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class HeadTransform:
    """What a family does to its logits after the matrix product: multiply by `scale`, in place, then softcap x
    tanh(z / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Float[Tensor, "c V"]) -> Float[Tensor, "c V"]:
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def bend(self, transformed: Float[Tensor, "c V"]) -> Float[Tensor, "c V"] | None:
        """d transformed / d (scale x raw): 1 - (z / softcap)^2 at the capped logit z; None: 1 everywhere."""
        return None if self.softcap is None else 1 - (transformed / self.softcap) ** 2


class TokenLogps(NamedTuple):
    """What a forward says of the scored tokens of a pack, all fp32; a token that several pairs share is there for each."""

    logps: Float[Tensor, "N"]
    """log p of each token."""
    mean_logits: Float[Tensor, "N"]
    """Mean over the vocabulary of the logits at its position, without gradient."""
    collision: Float[Tensor, "N"] | None = None
    """Collision entropy -log sum_v p(v)^2 at its position, without gradient, where it was asked for."""
    entropy: Float[Tensor, "N"] | None = None
    """Entropy -sum_v p(v) log p(v) at its position, in nats, likewise."""
    hit: Float[Tensor, "N"] | None = None
    """1 where no other token is more likely, else 0, likewise."""


def scored_logps(
    hidden: Float[Tensor, "C d"],
    weight: Float[Tensor, "V d"],
    bias: Float[Tensor, "V"] | None,
    targets: Int[Tensor, "C"],
    transform: HeadTransform = HeadTransform(),
    with_collision: bool = False,
    with_statistics: bool = False,
) -> TokenLogps:
    """log p(target) at each position, with what else is asked for; `with_statistics`: `entropy` and `hit`.

    Logits are made chunk by chunk, and made again in the backward pass unless few enough to keep. `weight` and `bias` are
    read once: under ZeRO-3 they must be the parameters themselves, read inside the forward of the module that the engine
    wraps.
    """
    asked = Extras(with_collision, with_statistics)
    logps, mean_logits, *others = _ScoredLogps.apply(  # type: ignore[misc]
        hidden, weight, bias, targets, transform, asked, torch.is_grad_enabled()
    )
    return TokenLogps(logps, mean_logits, *(x if wanted else None for x, wanted in zip(others, asked.each)))


def counted(tokens: TokenLogps, batch: PackedBatch) -> TokenLogps:
    """Computed tokens [C] -> tokens of every answer of every pair [N]: gradients of all that share a token add up."""
    if batch.scored_index is None:
        return tokens
    return TokenLogps(*(x if x is None else x[batch.scored_index] for x in tokens))  # type: ignore[arg-type]


def pair_logps(tokens: TokenLogps, batch: PackedBatch) -> PairLogps:
    """Sums and counts of the scored tokens of each answer of a pack, and of its prompts where they are scored; with the
    numbers that the rows give."""
    pairs, span, counts = batch.num_pairs, batch.span_index, scored_tokens(batch)
    common = torch.minimum(counts[0], counts[1])
    # Each span in two: within the length that both answers of the pair have, and beyond.
    beyond = batch.place_in_span >= common.repeat(3)[span]
    sums = _by_span(tokens.logps, span + beyond * 3 * pairs, 6 * pairs).view(2, 3, pairs)
    chosen, rejected, prompt = sums.sum(dim=0)
    collision: list[Any] = [None, None]
    if tokens.collision is not None:
        collision = list(_by_span(tokens.collision, span, 3 * pairs).view(3, pairs)[:PROMPT])
    return PairLogps(
        chosen=chosen,
        rejected=rejected,
        chosen_tokens=counts[0],
        rejected_tokens=counts[1],
        chosen_common=sums[0, 0],
        rejected_common=sums[0, 1],
        prompt=prompt,
        prompt_tokens=counts[2],
        chosen_collision=collision[0],
        rejected_collision=collision[1],
        **(batch.given or {}),
    )


def scored_tokens(batch: PackedBatch) -> Int[Tensor, "3 P"]:
    """Numbers of scored tokens of the chosen answers, the rejected answers and the prompts."""
    # Not bincount, which would wait for the GPU.
    return _by_span(torch.ones_like(batch.span_index), batch.span_index, 3 * batch.num_pairs).view(3, -1)


def _by_span(values: Tensor, span: Int[Tensor, "N"], spans: int) -> Tensor:
    return values.new_zeros(spans).index_add(0, span, values)


class _ScoredLogps(torch.autograd.Function):
    """log softmax at the targets: d logp / d logit_v = [v = target] - p_v. Probabilities are kept for the backward pass
    where all of them fit, and else made again, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: HeadTransform,
        asked: Extras,
        with_gradient: bool,
    ) -> tuple[Tensor, ...]:
        count = hidden.shape[0]
        logps = hidden.new_empty(count, dtype=torch.float32)
        log_normalizer = torch.empty_like(logps)
        mean_logit = torch.empty_like(logps)
        collision, entropy, hit = (torch.empty_like(logps) if wanted else None for wanted in asked.each)
        if transform.softcap is None:
            # The mean of h . w over the vocabulary is h . mean(w): one pass over the head instead of one over all logits.
            mean_bias = 0.0 if bias is None else bias.float().mean()
            mean_logit = transform.scale * (hidden.float() @ weight.mean(dim=0, dtype=torch.float32) + mean_bias)
        trained = with_gradient and any(ctx.needs_input_grad)  # which are asked for under no_grad too
        kept = _room_for_all(hidden, weight) if trained and transform.softcap is None else None
        for rows in _chunks(hidden, weight):
            logits = transform(raw_logits(hidden[rows], weight, bias, None if kept is None else kept[rows]))
            if transform.softcap is not None:
                mean_logit[rows] = logits.mean(dim=-1)
            normalize = by_powers if hidden.is_cpu else by_log_softmax
            found = normalize(logits, targets[rows, None], None if kept is None else kept[rows], asked)
            for whole, part in zip((logps, log_normalizer, collision, entropy, hit), found):
                if whole is not None and part is not None:
                    whole[rows] = part
        ctx.save_for_backward(hidden, weight, bias, targets, log_normalizer)
        ctx.transform, ctx.probabilities = transform, kept
        others = [logps.new_empty(0) if x is None else x for x in (collision, entropy, hit)]
        ctx.mark_non_differentiable(mean_logit, *others)
        return logps, mean_logit, *others

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, targets, log_normalizer = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # Of the gradient s (onehot - p) at the logits, -|s| is computed with it, and the sign of s beside it: to give it to
        # d numbers of a row costs less than to V of them.
        slope = grad_logps * ctx.transform.scale
        minus_sign, slope_size = -slope.sign()[:, None], slope.abs()
        signed = (hidden * minus_sign).to(hidden.dtype) if needs_weight else hidden
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        grad_bias = torch.empty_like(bias) if needs_bias else None
        # Used up: a second backward pass makes them again.
        kept, ctx.probabilities = ctx.probabilities, None
        # By parts of the vocabulary: each row of the head gets its whole gradient at once, and no sum of the head's size in
        # fp32 is needed beside it.
        parts, blocks = _blocks(hidden, weight) if kept is None else ([slice(0, len(weight))], [slice(0, len(hidden))])
        for words in parts:
            of_words = None  # summed in fp32 where the tokens come in several chunks
            if grad_weight is not None and len(blocks) != 1:
                of_words = torch.zeros_like(weight[words], dtype=torch.float32)
            of_biases = None if grad_bias is None else torch.zeros_like(grad_bias[words], dtype=torch.float32)
            for rows in blocks:
                place = targets[rows, None] - words.start
                if kept is None:
                    logits = ctx.transform(raw_logits(hidden[rows], weight[words], None if bias is None else bias[words]))
                    bend = ctx.transform.bend(logits)
                    grad = logit_gradient(logits, log_normalizer[rows], slope_size[rows], place, bend, hidden.dtype)
                else:
                    grad = kept_logit_gradient(kept, slope_size, place, hidden.dtype)
                if grad_hidden is not None:
                    add_product(grad_hidden[rows], grad, weight[words])
                if of_words is not None:
                    add_product(of_words, grad.t(), signed[rows])
                elif grad_weight is not None:
                    torch.mm(grad.t(), signed, out=grad_weight[words])
                if of_biases is not None:
                    of_biases += (grad * minus_sign[rows]).sum(dim=0, dtype=torch.float32)
            if grad_weight is not None and of_words is not None:
                grad_weight[words] = of_words
            if grad_bias is not None and of_biases is not None:
                grad_bias[words] = of_biases
        return (
            None if grad_hidden is None else grad_hidden.mul_(minus_sign).to(hidden.dtype),
            grad_weight,
            grad_bias,
            None,
            None,
            None,
            None,
        )


def _room_for_all(hidden: Tensor, weight: Tensor) -> Tensor | None:
    """A place for the probabilities of every scored token, where they are few enough to keep."""
    shape = hidden.shape[0], weight.shape[0]
    return hidden.new_empty(shape, dtype=torch.float32) if fits(*shape, hidden.device.type) else None


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """The scored tokens, a chunk at a time with the whole vocabulary."""
    size = max(1, head_room.room(hidden.device.type) // weight.shape[0])
    return _slices(hidden.shape[0], size if hidden.is_cpu else -(-size // TILE) * TILE)


def _blocks(hidden: Tensor, weight: Tensor) -> tuple[list[slice], list[slice]]:
    """(parts of the vocabulary, chunks of the scored tokens): all tokens at once where they are few."""
    room, words, rows = head_room.room(hidden.device.type), weight.shape[0], max(hidden.shape[0], 1)
    part = min(max(_in_tiles(room // rows), PART), words)
    chunk = rows if room // part >= rows else _in_tiles(max(room // part, 1))
    return _slices(words, part), _slices(hidden.shape[0], chunk)


def _in_tiles(size: int) -> int:
    return size // TILE * TILE or size


def _slices(count: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]
