"""Attention over a pack that several ranks hold between them: each has some tokens of all heads outside of attention, and
all tokens of some heads within (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509).

Every function here is called by all N ranks of a group alike, in a forward, and its gradient is asked for alike. T tokens of
the pack, m of a rank, C scored ones, c of a rank; H heads, G key-value heads, of which a rank has g once they are repeated;
D and E sizes of keys and of values. What ranks say to each other comes in as functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Any

import torch

from dspref.errors import ConfigError
from dspref.model.logps import TokenLogps

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class Group:
    """N ranks that hold packs between them, as one of them sees it."""

    size: int
    number: int
    """This rank's, from 0."""
    swap: Callable[[Tensor], Tensor]
    """[N, ...] -> the same shape: row i is what rank i had in the row with this rank's number. Its own inverse."""
    add: Callable[[Tensor], Tensor]
    """The element-wise sum over the group."""


def by_heads(
    q: Float[Tensor, "m H D"],
    k: Float[Tensor, "m G D"],
    v: Float[Tensor, "m G E"],
    tokens: int,
    group: Group,
) -> tuple[Float[Tensor, "T H/N D"], Float[Tensor, "T g D"], Float[Tensor, "T g E"]]:
    """Own tokens of all heads -> all `tokens` of own heads, by one exchange. Key-value heads are repeated until the ranks
    divide them. Raises ConfigError where the ranks do not divide the heads."""
    heads = q.shape[1]
    if heads % group.size:
        few = gcd(heads, group.size)
        raise ConfigError(f"parallel.sequence: {group.size} does not divide the model's {heads} attention heads; use {few}")
    repeats = group.size // gcd(k.shape[1], group.size)
    if repeats > 1:
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    rows = [x.unflatten(1, (group.size, -1)).transpose(0, 1) for x in (q, k, v)]  # [N, m, heads of a rank, D]
    swapped = _Swap.apply(torch.cat([row.flatten(2) for row in rows], dim=2), group.swap)
    # Behind the last token are those that make all ranks have as many: no attention sees them.
    parts = swapped.flatten(0, 1)[:tokens].split([row[0, 0].numel() for row in rows], dim=1)  # type: ignore[union-attr]
    return tuple(part.unflatten(1, row.shape[2:]) for part, row in zip(parts, rows))  # type: ignore[return-value]


def by_tokens(output: Float[Tensor, "T H/N D"], group: Group) -> Float[Tensor, "m H D"]:
    """All tokens of own heads -> own tokens of all heads, contiguous; 0 for those beyond the pack's."""
    more = -len(output) % group.size
    rows = torch.nn.functional.pad(output, (0, 0, 0, 0, 0, more)).unflatten(0, (group.size, -1))  # [N, m, H/N, D]
    # Of one head, what is flattened is a view; some layers ask for more.
    return _Swap.apply(rows, group.swap).transpose(0, 1).flatten(1, 2).contiguous()  # type: ignore[union-attr]


def own_heads(of_heads: Float[Tensor, "H ..."] | None, group: Group) -> Float[Tensor, "H/N ..."] | None:
    """Of what a layer has for each head, that of this rank's."""
    return None if of_heads is None else of_heads.unflatten(0, (group.size, -1))[group.number]


def of_all(tokens: TokenLogps, scored: Int[Tensor, "c"], count: int, group: Group) -> TokenLogps:
    """What a rank says of the scored tokens that it predicts -> what all say of all `count`, the same on each.

    The gradient of a rank reaches its own tokens alone: summed over the group, gradients of weights are those of one rank
    that has the whole pack."""
    own = [x for x in tokens if x is not None]
    first, *others = _Gathered.apply(torch.stack(own), scored, count, group.add)  # type: ignore[misc]
    found = iter([first, *(x.detach() for x in others)])
    return TokenLogps(*(x if x is None else next(found) for x in tokens))  # type: ignore[arg-type]


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, swap: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.swap = swap
        return swap(rows.contiguous())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.swap(grad.contiguous()), None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, scored: Tensor, count: int, add: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(scored)
        whole = own.new_zeros(len(own), count)
        whole[:, scored] = own
        return add(whole)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (scored,) = ctx.saved_tensors
        return grad[:, scored], None, None, None
