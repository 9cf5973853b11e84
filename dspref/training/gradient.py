"""The gradient of one optimizer step: the shares of its packs, added up.

Where the loss is a sum over pairs, one pass over the packs does it, and so it does over lists that lie in one pack each.
Where it is a function of the whole step (aot, BCO's delta, the router loss with scope `step`, a list that no pack has room
for), a first pass without gradient sees all pairs of all ranks, the loss is evaluated once, and the second pass
back-propagates its slope at every log-prob. Either way the result is that of the step, whatever the packs and the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from dspref import distributed
from dspref.data.batch import PackedBatch
from dspref.data.loader import Step
from dspref.engine.engine import Engine, Still
from dspref.model import router
from dspref.model.logps import pair_logps
from dspref.model.router import Routing
from dspref.objectives import Objective, RunningMean
from dspref.objectives.families import PairLogps, PairLoss, total
from dspref.reference.modes import Reference, mismatched_name
from dspref.report.metrics import Meter
from dspref.report.performance import Clock
from dspref.report.profiling import Profile
from dspref.training.numbers import Suspects, with_faults

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class StepLoss:
    """What a step minimises: the objective of its pairs + `router_coef` x the load-balancing loss of the routers.

    `router_scope`: `micro`, the load of the packs that run at the same time on all ranks; `step`, of all packs of the step.
    """

    objective: Objective
    router_coef: float = 0.0
    router_scope: str = "micro"

    @property
    def looks_ahead(self) -> bool:
        """Whether a pack's gradient depends on packs that come after it."""
        return self.objective.couples or bool(self.router_coef and self.router_scope == "step")


@dataclass(frozen=True)
class Instruments:
    """What looks on while a gradient is computed, each where there is one."""

    meter: Meter | None = None
    clock: Clock | None = None
    suspects: Suspects | None = None
    beat: Callable[[str], None] | None = None
    profile: Profile | None = None

    def begin(self, phase: str) -> None:
        """A phase of PHASES begins, and the one before it has ended; with "" the step is done."""
        if self.clock is None or self.clock.phase == phase:
            return
        if self.beat:
            self.beat(self.clock.phase)
        self.clock.begin(phase)
        if self.profile and phase:
            self.profile.phase(phase)

    def at_loss(self, pair_ids: Tensor, loss: PairLoss) -> None:
        if self.suspects:
            self.suspects.add(pair_ids, loss)


def accumulate(
    step: Step,
    policy: Engine,
    loss: StepLoss,
    reference: Reference,
    rewards: RunningMean,
    looking: Instruments,
) -> RunningMean:
    """Add the gradient of the step's loss, while `looking` on.

    Returns `rewards`, the running mean that BCO reads, with this step in it.
    """
    if loss.objective.has_mismatched:
        with policy.rehearsing():
            point = reference_point(
                "train", step.mismatched, step.counts["mismatched_answers"], policy, reference, looking.begin
            )
        loss = replace(loss, objective=replace(loss.objective, point=point))
    one_pack = step.num_packs == 1 and distributed.world().groups == 1
    looks_ahead = loss.looks_ahead or step.splits_lists
    passes = _two_passes if looks_ahead and not one_pack else _one_pass
    return passes(step, policy, loss, reference, rewards, looking)


def reference_point(
    name: str,
    mismatched: Iterable[PackedBatch],
    answers: int,
    policy: Engine | Still,
    reference: Reference,
    begin: Callable[[str], None] = lambda phase: None,
    must_stop: Callable[[], bool] = lambda: False,
) -> Float[Tensor, ""] | None:
    """KTO's z (arXiv:2402.01306, section 4.1), fp64 in nats: the mean of log u over mismatched pairs of all ranks, or 0.

    `answers`: their number on all ranks. Called without gradient, by all ranks alike; None where `must_stop`, asked before
    each pack, said so."""
    total = torch.zeros((), dtype=torch.float64, device=policy.device)
    for batch in mismatched:
        if must_stop():
            return None
        batch = batch.to(policy.device)
        begin("reference")
        base = reference(mismatched_name(name), batch)
        assert base is not None
        begin("forward")
        pairs = pair_logps(policy.forward(batch)[0], batch)
        total += (pairs.chosen - base.chosen + pairs.rejected - base.rejected).double().sum()
    return (distributed.sum_of_groups(total) / max(answers, 1)).clamp(min=0)


def _one_pass(
    step: Step,
    policy: Engine,
    loss: StepLoss,
    reference: Reference,
    rewards: RunningMean,
    looking: Instruments,
) -> RunningMean:
    for batch in step.packs:
        looking.begin("data")
        batch = batch.to(policy.device)
        looking.begin("reference")
        base = reference("train", batch)
        looking.begin("forward")
        tokens, routing = policy.forward(batch, with_statistics=looking.meter is not None)
        pairs = pair_logps(tokens, batch)
        rewards = _with_step(rewards, loss.objective, pairs, base)
        value = loss.objective(pairs, base, rewards.value)
        share = with_faults(total(value, step.counts), value)
        if routing:
            share = share + loss.router_coef * _balance(routing, step, None, looking.meter)
        looking.at_loss(batch.pair_ids, value)
        if meter := looking.meter:
            meter.add_pairs(value, pairs, batch.pair_ids)
            meter.add_logits(tokens, pairs, batch)
            if step.number == 1 and base:
                meter.add_gap(pairs, base)
        looking.begin("backward")
        policy.backward(share)
    return rewards


def _two_passes(
    step: Step,
    policy: Engine,
    loss: StepLoss,
    reference: Reference,
    rewards: RunningMean,
    looking: Instruments,
) -> RunningMean:
    packs = [batch.to(policy.device) for batch in step.packs]
    seen, routings = [], []
    with policy.rehearsing():
        for batch in packs:
            looking.begin("reference")
            base = reference("train", batch)
            looking.begin("forward")
            tokens, routing = policy.forward(batch)
            seen.append((pair_logps(tokens, batch), base))
            routings += [routing] if routing else []
    load = _step_load(routings) if routings and loss.router_scope == "step" else None
    pairs, base, own = gathered(seen)
    rewards = _with_step(rewards, loss.objective, pairs, base)
    slopes = slopes_of(loss.objective, pairs, base, rewards.value, step)
    value = rows_of(loss.objective(pairs, base, rewards.value), own)
    ids = torch.cat([batch.pair_ids for batch in packs])
    looking.at_loss(ids, value)
    if meter := looking.meter:
        meter.add_pairs(value, part_of(pairs, own), ids)
        if step.number == 1 and base:
            meter.add_gap(part_of(pairs, own), part_of(base, own))
    start = own.start
    for batch in packs:
        looking.begin("forward")
        tokens, routing = policy.forward(batch, with_statistics=meter is not None)
        logps = pair_logps(tokens, batch)
        share = with_faults(_surrogate(logps, part_of(slopes, slice(start, start + batch.num_pairs))), value)
        start += batch.num_pairs
        if routing:
            share = share + loss.router_coef * _balance(routing, step, load, looking.meter)
        if meter:
            meter.add_logits(tokens, logps, batch)
        looking.begin("backward")
        policy.backward(share)
    return rewards


def _with_step(rewards: RunningMean, objective: Objective, pairs: PairLogps, base: PairLogps | None) -> RunningMean:
    """The running mean with the mean reward of these pairs, which are the whole step, where the objective reads it."""
    if not objective.has_running_mean:
        return rewards
    metrics = objective(pairs.detach(), base).metrics
    total = (metrics["rewards/chosen"] + metrics["rewards/rejected"]).double().sum()
    return rewards.updated((total / pairs.count("answers")).item())


def slopes_of(objective: Objective, pairs: PairLogps, base: PairLogps | None, delta: float, step: Step) -> PairLogps:
    """d loss of the step / d log-prob, for every log-prob of every pair; token counts have slope 0."""
    leaves = pairs.map(lambda x: x.detach().clone().requires_grad_() if x.is_floating_point() else x)
    given = [leaf for leaf in _present(leaves) if leaf.requires_grad]
    slopes = torch.autograd.grad(total(objective(leaves, base, delta), step.counts), given, allow_unused=True)
    found = {id(leaf): torch.zeros_like(leaf) if slope is None else slope for leaf, slope in zip(given, slopes)}
    return leaves.map(lambda x: found.get(id(x), torch.zeros_like(x)))


def _surrogate(logps: PairLogps, slopes: PairLogps) -> Float[Tensor, ""]:
    """A number whose gradient is that of the loss: sum of slope x log-prob."""
    terms = zip(_present(logps), _present(slopes))
    return torch.stack([(slope * x).sum() for x, slope in terms if x.requires_grad]).sum().float()


# ---------------------------------------------------------------------------------------------------------------------
# Pairs of all packs and ranks


def gathered(
    seen: Sequence[tuple[PairLogps, PairLogps | None]],
) -> tuple[PairLogps, PairLogps | None, slice]:
    """(policy, reference) of packs -> those of all packs of all ranks, and which of the pairs are this rank's.

    Float64, without gradient. The reference is None where the objective needs none.
    """
    policy, own = _all_rows([pairs for pairs, _ in seen])
    bases = [base for _, base in seen if base]
    return policy, _all_rows(bases)[0] if bases else None, own


def _all_rows(parts: Sequence[PairLogps]) -> tuple[PairLogps, slice]:
    columns = [torch.cat(column).detach().double() for column in zip(*(_present(part) for part in parts))]
    table, own = distributed.gather_rows(torch.stack(columns, dim=1))
    rows = iter(table.unbind(dim=1))
    return parts[0].map(lambda x: next(rows) if x.is_floating_point() else next(rows).to(x.dtype)), own


def _present(pairs: PairLogps) -> list[Tensor]:
    return [value for value in vars(pairs).values() if value is not None]


def part_of(pairs: PairLogps, rows: slice) -> PairLogps:
    return pairs.map(lambda values: values[rows])


def rows_of(loss: PairLoss, rows: slice) -> PairLoss:
    terms = {name: replace(term, values=term.values[rows]) for name, term in loss.terms.items()}
    judged = None if loss.judged is None else loss.judged[rows]
    return PairLoss(terms, {name: values[rows] for name, values in loss.metrics.items()}, judged)


# ---------------------------------------------------------------------------------------------------------------------
# The router loss


def _balance(routing: Routing, step: Step, step_load: tuple[Tensor, ...] | None, meter: Meter | None) -> Float[Tensor, ""]:
    """This pack's share of the load-balancing loss: against the load of the step, else of the packs that run now."""
    load, tokens = step_load or distributed.sum_over_ranks(routing.load, routing.tokens)
    share = router.balance(routing.probabilities, load, tokens, step.counts["tokens"])
    if meter:
        meter.add("aux_loss", share * step.counts["tokens"], routing.tokens)
        meter.add_load(routing)
    return share


def _step_load(routings: Sequence[Routing]) -> tuple[Tensor, ...]:
    """(load, tokens) of all packs of all ranks."""
    sums = (torch.stack([getattr(routing, name) for routing in routings]).sum(0) for name in ("load", "tokens"))
    return distributed.sum_over_ranks(*sums)
