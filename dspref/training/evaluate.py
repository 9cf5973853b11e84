"""Held-out pairs: the same forward, the same objective, the same metrics, without a gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from dspref.data.ahead import ahead
from dspref.data.loader import Packing, sweep
from dspref.data.mismatched import Mismatched
from dspref.data.store import PairStore
from dspref.engine.engine import Engine, Still
from dspref.model.logps import pair_logps
from dspref.objectives import Objective, RunningMean
from dspref.objectives.families import PairLogps, PairLoss
from dspref.reference.modes import Reference
from dspref.report.metrics import Meter
from dspref.training import gradient
from dspref.training.gradient import StepLoss


def evaluate(
    policy: Engine | Still,
    loss: StepLoss,
    reference: Reference,
    rewards: RunningMean,
    sets: Mapping[str, PairStore],
    packing: Packing,
    must_stop: Callable[[], bool] = lambda: False,
    each: Callable[[str, torch.Tensor, PairLoss], None] = lambda prefix, ids, loss: None,
) -> dict[str, float] | None:
    """Metrics of every held-out set over all its pairs, each name behind the set's prefix (`eval_`, `eval_<set>_`).

    None where `must_stop`, which all ranks ask before each pack, said so. An objective that couples pairs sees the
    whole set at once; `rewards`, BCO's running mean, stays as training left it. `each` is told of every
    set (prefix, this rank's pairs, what the objective says of each).
    """
    record: dict[str, float] = {}
    for prefix, store in sets.items():
        meter = Meter(policy.device, loss.router_coef)
        seen: list[tuple[PairLogps, PairLogps | None]] = []
        ids: list[torch.Tensor] = []
        with policy.evaluating():
            for batch in ahead(batch.pinned() for _, batch in sweep(store, packing)):
                if must_stop():
                    return None
                batch = batch.to(policy.device)
                tokens, routing = policy.forward(batch, with_statistics=True)
                ids.append(batch.pair_ids)
                seen.append((pair_logps(tokens, batch), reference(prefix, batch)))
                meter.add_logits(tokens, seen[-1][0], batch)
                if routing:
                    meter.add_load(routing)
        pairs, base, own = gradient.gathered(seen)
        objective = _with_point(loss.objective, prefix, store, policy, reference, packing, must_stop)
        if objective is None:
            return None
        value = gradient.rows_of(objective(pairs, base, rewards.value), own)
        meter.add_pairs(value, gradient.part_of(pairs, own))
        each(prefix, torch.cat(ids), value)
        record |= {f"{prefix}{name}": value for name, value in meter.reduce().items()}
    return record


def _with_point(
    objective: Objective,
    name: str,
    store: PairStore,
    policy: Engine | Still,
    reference: Reference,
    packing: Packing,
    must_stop: Callable[[], bool],
) -> Objective | None:
    """The objective with the reference point of a held-out set, where it has one: that of all its pairs together. None where
    `must_stop` said so."""
    if not objective.has_mismatched:
        return objective
    others = Mismatched.of_all(store)
    with policy.evaluating():
        packs = ahead(batch.pinned() for _, batch in sweep(others, packing))
        answers = others.num_answers()
        point = gradient.reference_point(name, packs, answers, policy, reference, must_stop=must_stop)
    return None if point is None else replace(objective, point=point)
