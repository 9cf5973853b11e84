"""A loss of the user's own at three made-up pairs, before anything is read or loaded: what would go wrong in the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from dspref.errors import ConfigError
from dspref.objectives import own
from dspref.objectives.families import Loss
from dspref.objectives.losses import Ratios

if TYPE_CHECKING:
    from torch import Tensor

# Log-ratios (the third pair's are 0, as all are before the first step), or log-probs, of chosen and rejected.
RATIOS = ((0.3, -1.2, 0.0), (-0.4, 0.9, 0.0))
SCORES = ((-1.2, -0.4, -2.1), (-0.9, -1.7, -2.1))
TOKENS = ((5, 3, 8), (4, 7, 2))
REFERENCE_MARGINS = (0.5, -2.0, 1.5)
ALL = slice(None)


def fault_of(loss_type: str, loss: Loss, keys: Mapping[str, Any], of_ratios: bool) -> str | None:
    """What is wrong with a loss of these keys on the CPU, in one line; None where nothing is. `of_ratios`: it is a function
    of `Ratios`, else of two scores."""
    import torch

    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            fault = _fault_of(loss_type, loss, partial(loss.function, **keys), of_ratios)
    except ConfigError as error:
        return str(error).removeprefix("objective.loss_type: ")
    return fault and f"{loss_type}: {own.source(loss_type).where}: {fault}"


def _fault_of(loss_type: str, loss: Loss, function: Callable[..., Tensor], of_ratios: bool) -> str | None:
    import torch

    leaves = [torch.tensor(row, requires_grad=True) for row in (RATIOS if of_ratios else SCORES)]
    values = function(*_inputs(leaves, ALL, of_ratios))
    slopes = torch.autograd.grad(values.sum(), leaves, allow_unused=True)
    if all(slope is None for slope in slopes):
        return "what it returns does not depend on what it is given, so nothing would be trained"
    for what, found in (("value", [values.detach()]), ("gradient", [slope for slope in slopes if slope is not None])):
        finite = torch.stack([x.isfinite() for x in found]).all(dim=0).tolist()
        if not all(finite):
            return f"its {what} is not finite for {_pair(leaves, finite.index(False), of_ratios)}"
    if not torch.equal(values, function(*_inputs(leaves, ALL, of_ratios))):
        return "it returns other values the second time; a loss is a function of its arguments alone"
    if loss.couples:
        return None
    alone = torch.cat([function(*_inputs(leaves, slice(i, i + 1), of_ratios)) for i in range(len(values))])
    if not torch.allclose(values, alone, rtol=1e-4, atol=1e-5):
        name = own.component(loss_type)
        return (
            f"the value of a pair depends on the pairs beside it, which are whoever shares its pack; if all pairs of the "
            f"step are meant, write {name}.{own.COUPLES} = True behind the function"
        )
    return None


def _pair(leaves: Sequence[Tensor], row: int, of_ratios: bool) -> str:
    chosen, rejected = (leaf[row].item() for leaf in leaves)
    if of_ratios and chosen == rejected == 0:
        return "log-ratios of 0, which all pairs have before the first step"
    return f"{'log-ratios' if of_ratios else 'log-probs'} of {chosen:g} (chosen) and {rejected:g} (rejected)"


def _inputs(leaves: Sequence[Tensor], rows: slice, of_ratios: bool) -> tuple[Any, ...]:
    import torch

    chosen, rejected = leaves if rows == ALL else (leaf[rows] for leaf in leaves)  # leaves refuse to be changed in place
    if not of_ratios:
        return chosen, rejected
    chosen_tokens, rejected_tokens = (torch.tensor(row)[rows] for row in TOKENS)
    return (Ratios(chosen, rejected, chosen_tokens, rejected_tokens, torch.tensor(REFERENCE_MARGINS)[rows]),)
