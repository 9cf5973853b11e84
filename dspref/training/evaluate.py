"""Held-out pairs: the same forward, the same objective, the same metrics, without a gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dspref.data.ahead import ahead
from dspref.data.loader import Packing, sweep
from dspref.data.store import PairStore
from dspref.engine.engine import Engine
from dspref.model.logps import pair_logps
from dspref.objectives import RunningMean
from dspref.objectives.families import PairLogps
from dspref.reference.modes import Reference
from dspref.report.metrics import Meter
from dspref.training import gradient
from dspref.training.gradient import StepLoss


def evaluate(
    policy: Engine,
    loss: StepLoss,
    reference: Reference,
    rewards: RunningMean,
    sets: Mapping[str, PairStore],
    packing: Packing,
    must_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Metrics of every held-out set over all its pairs, each name behind the set's prefix (`eval_`, `eval_<set>_`).

    None where `must_stop`, which all ranks ask before each pack, said so. An objective that couples pairs sees the
    whole set at once; `rewards`, BCO's running mean, stays as training left it.
    """
    record: dict[str, float] = {}
    for prefix, store in sets.items():
        meter = Meter(policy.device, loss.router_coef)
        seen: list[tuple[PairLogps, PairLogps | None]] = []
        with policy.evaluating():
            for batch in ahead(batch.pinned() for _, batch in sweep(store, packing)):
                if must_stop():
                    return None
                batch = batch.to(policy.device)
                tokens, routing = policy.forward(batch, with_statistics=True)
                seen.append((pair_logps(tokens, batch), reference(prefix, batch)))
                meter.add_logits(tokens, seen[-1][0], batch)
                if routing:
                    meter.add_load(routing)
        pairs, base, own = gradient.gathered(seen)
        value = loss.objective(pairs, base, rewards.value)
        meter.add_pairs(gradient.rows_of(value, own), gradient.part_of(pairs, own))
        record |= {f"{prefix}{name}": value for name, value in meter.reduce().items()}
    return record
