"""What is computed of a chunk of logits: log-probs and what else is asked for, the gradient, and the products with the head.

c tokens of a chunk, v words of a part of the vocabulary V.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


class Extras(NamedTuple):
    """What a forward is asked for beside log-probs and mean logits."""

    collision: bool
    statistics: bool

    @property
    def each(self) -> tuple[bool, bool, bool]:
        """Of collision entropy, entropy, hit."""
        return self.collision, self.statistics, self.statistics


class Normalized(NamedTuple):
    """Of a chunk of logits, all fp32 [c]."""

    logps: Tensor
    log_normalizer: Tensor
    """log of the sum of exp."""
    collision: Tensor | None
    entropy: Tensor | None
    hit: Tensor | None


def by_powers(logits: Float[Tensor, "c V"], targets: Int[Tensor, "c 1"], kept: Tensor | None, asked: Extras) -> Normalized:
    """In place of the logits (which is `kept`) come their probabilities: no other memory is touched but for `statistics`,
    which is what counts near a CPU's caches."""
    of_target = logits.gather(-1, targets)[:, 0]
    largest = logits.amax(dim=-1)
    powers = logits.sub_(largest[:, None]).exp_()
    total = powers.sum(dim=-1)
    log_normalizer = largest + total.log()
    collision = entropy = hit = None
    if asked.collision:
        square = torch.linalg.vector_norm(powers, dim=-1).log() + largest
        collision = 2 * (log_normalizer - square)
    if asked.statistics:
        # -sum p log p with p = e / Z: log Z - sum e log e / Z
        entropy = total.log() + torch.special.entr(powers).sum(dim=-1) / total
        hit = (of_target >= largest).float()
    if kept is not None:
        powers.mul_((largest - log_normalizer).exp_()[:, None])
    return Normalized(of_target - log_normalizer, log_normalizer, collision, entropy, hit)


def by_log_softmax(
    logits: Float[Tensor, "c V"], targets: Int[Tensor, "c 1"], kept: Tensor | None, asked: Extras
) -> Normalized:
    """The same by torch's own kernel, with less reading and writing of memory."""
    chances = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    logps = chances.gather(-1, targets)[:, 0]
    log_normalizer = logits.gather(-1, targets)[:, 0] - logps
    entropy = hit = None
    if asked.statistics:
        hit = (logits.gather(-1, targets)[:, 0] >= logits.amax(dim=-1)).float()
        entropy = torch.special.entr(chances.exp()).sum(dim=-1)
    if kept is not None:
        torch.exp(chances, out=kept)
    collision = -chances.mul_(2).logsumexp(dim=-1) if asked.collision else None
    return Normalized(logps, log_normalizer, collision, entropy, hit)


def logit_gradient(
    logits: Float[Tensor, "c v"],
    log_normalizer: Float[Tensor, "c"],
    slope_size: Float[Tensor, "c"],
    place: Int[Tensor, "c 1"],
    bend: Float[Tensor, "c v"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "c v"]:
    """|s| (p - onehot) x `bend` over part of the vocabulary, in `dtype`; the logits' memory is used up.

    |s| goes into the exponent, |s| p = exp(z - (log Z - log |s|)): one pass over the logits less.
    """
    powers = logits.sub_((log_normalizer - slope_size.log())[:, None])
    column = _column(place, powers)
    of_target = powers.gather(-1, column).exp_() - slope_size[:, None]
    grad = torch.exp(powers, out=_typed(powers, dtype) if bend is None else powers)
    if bend is not None:
        grad, of_target = torch.mul(grad, bend, out=_typed(grad, dtype)), of_target * bend.gather(-1, column)
    return _with_target(grad, of_target, place)


def kept_logit_gradient(
    probabilities: Float[Tensor, "C V"], slope_size: Float[Tensor, "C"], place: Int[Tensor, "C 1"], dtype: torch.dtype
) -> Float[Tensor, "C V"]:
    """The same out of probabilities, whose memory is used up."""
    of_target = (probabilities.gather(-1, place) - 1) * slope_size[:, None]
    return _with_target(torch.mul(probabilities, slope_size[:, None], out=_typed(probabilities, dtype)), of_target, place)


def _with_target(grad: Float[Tensor, "c v"], of_target: Float[Tensor, "c 1"], place: Int[Tensor, "c 1"]) -> Tensor:
    """Put each row's number at its target, where the target's `place` lies in this part of the vocabulary. It was computed
    in fp32: in 16 bits, p near 1 leaves nothing to subtract."""
    column = _column(place, grad)
    return grad.scatter_(-1, column, torch.where(place == column, of_target.to(grad.dtype), grad.gather(-1, column)))


def _column(place: Int[Tensor, "c 1"], part: Float[Tensor, "c v"]) -> Int[Tensor, "c 1"]:
    return place.clamp(0, part.shape[1] - 1)


def _typed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A place for a result of this type: the tensor itself where that is its own."""
    return tensor if tensor.dtype == dtype else torch.empty_like(tensor, dtype=dtype)


def raw_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """fp32 logits, in `out` where that is given."""
    if hidden.dtype != torch.float32 and multiplies_into_fp32(hidden):
        logits = product(hidden, weight.t(), out)
        return logits if bias is None else logits.add_(bias)
    if out is None:
        return torch.nn.functional.linear(hidden, weight, bias).float()
    if hidden.dtype == torch.float32:
        torch.mm(hidden, weight.t(), out=out)
        return out if bias is None else out.add_(bias)
    return out.copy_(torch.nn.functional.linear(hidden, weight, bias))


def product(a: Float[Tensor, "n k"], b: Float[Tensor, "k m"], out: Tensor | None = None) -> Float[Tensor, "n m"]:
    """The fp32 product of two matrices of one type. What is summed in fp32 is not rounded to 16 bits first, where torch and
    the device can: bf16 has a logit of 20 to 0.06."""
    if a.dtype != torch.float32 and multiplies_into_fp32(a):
        return torch.mm(a, b, out_dtype=torch.float32, out=out)  # type: ignore[call-overload, arg-type]
    product = torch.mm(a, b).float()
    return product if out is None else out.copy_(product)


def add_product(total: Float[Tensor, "n m"], a: Float[Tensor, "n k"], b: Float[Tensor, "k m"]) -> None:
    """total += a b in fp32, by the matrix product itself where it can."""
    if a.dtype == torch.float32:
        torch.addmm(total, a, b, out=total)
    elif multiplies_into_fp32(a) and "dtype_out" in torch.ops.aten.addmm.overloads():
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)  # type: ignore[call-overload]
    else:
        total += product(a, b)


def multiplies_into_fp32(matrix: Tensor) -> bool:
    """Whether torch has a product of 16-bit matrices with an fp32 result here: from 2.8 on, on CUDA alone."""
    return matrix.is_cuda and torch.version.cuda is not None and "dtype" in torch.ops.aten.mm.overloads()
