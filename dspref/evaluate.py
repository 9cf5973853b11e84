"""Held-out pairs: the same forward, the same objective, the same metrics, without a gradient."""

from __future__ import annotations

from collections.abc import Mapping

from dspref.data.loader import Layout, sweep
from dspref.data.store import PairStore
from dspref.engine import Engine
from dspref.logps import pair_logps
from dspref.metrics import Meter
from dspref.objectives import Objective
from dspref.reference import Reference


def evaluate(
    policy: Engine,
    objective: Objective,
    reference: Reference,
    sets: Mapping[str, PairStore],
    layout: Layout,
) -> dict[str, float]:
    """Metrics of every held-out set over all its pairs, each name behind the set's prefix (`eval_`, `eval_<set>_`)."""
    record: dict[str, float] = {}
    for prefix, store in sets.items():
        meter = Meter(policy.device)
        with policy.evaluating():
            for _, batch in sweep(store, layout):
                batch = batch.to(policy.device)
                logps, mean_logits = policy.logps(batch)
                pairs = pair_logps(logps, batch.span_index, batch.num_pairs)
                meter.add_pairs(objective(pairs, reference(prefix, batch)), pairs, mean_logits, batch)
        record |= {f"{prefix}{name}": value for name, value in meter.reduce().items()}
    return record
