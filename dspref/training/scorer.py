"""score(config): the reference's log-probs ahead of the run that needs them. Every rank runs this; no policy is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from functools import partial

import numpy as np
import torch

from dspref import distributed
from dspref.config import Config
from dspref.data.loader import Packing
from dspref.data.mismatched import Pairs
from dspref.engine import engine
from dspref.errors import ConfigError, NumericFault
from dspref.model import loading
from dspref.objectives import build_objective
from dspref.reference import filling, modes, spec
from dspref.reference.spec import ROUNDING, ReferenceSpec
from dspref.reference.store import ReferenceStore
from dspref.report import console
from dspref.training import demand, preparation, stages


def score(config: Config, share: tuple[int, int] = (0, 1), verify: int = 0) -> None:
    """Fill the reference store with what it lacks of the run's data sets.

    `share` = (k, n): the k-th of n jobs that fill it together. `verify`: how many pairs, drawn at random, to score once
    more and compare; raises NumericFault where one differs by more than rounding.
    """
    reference = stages.reference_spec(config)
    refuse_without_store(config.objective.name, reference)
    distributed.init(config.train.seed)
    device = engine.bring_up(config.model.dtype)
    loading.quiet()
    _, _, pairs, held_out = preparation.prepare(config.model, config.data_read, reference, config.train.optim, device.type)
    objective = build_objective(**config.objective.model_dump())
    data = preparation.laid_out(config.model, config.data)
    planned, loader = demand.plan(objective, data, config.train, pairs, held_out)
    packing = modes.scoring_packing(reference, planned, device.type)
    sets = demand.sets(objective, loader, held_out)
    weights = config.model.name_or_path

    digest = distributed.on_main(lambda: spec.digest(reference, weights))
    store = modes.open_store(reference, digest or "")
    wanted = filling.wanted_of(store, sets)
    scorer = partial(modes.scorer, reference, None, weights, device.type)
    with ExitStack() as stack:
        forward = stack.enter_context(scorer()) if verify else None
        ready = (lambda: nullcontext(forward)) if forward else scorer
        with console.scoring() as view:
            scored = filling.fill(store, wanted, sets, ready, packing, device, share, view)
        filling.report(store, wanted, scored)
        if forward:
            _verify(spec.described(reference, "").section.dtype, forward, store, wanted, sets, verify, packing, device)


def refuse_without_store(objective: str, reference: ReferenceSpec) -> None:
    mode = reference.mode
    if mode == "none":
        raise ConfigError(f"objective.name: {objective} needs no reference here; there is nothing to score")
    if mode != "stored":
        raise ConfigError(f"reference.mode: {mode} keeps its reference in memory and stores nothing; use stored")
    if reference.policy.init == "random" and reference.section.name_or_path is None:
        raise ConfigError("model.init: random weights are drawn when the run begins; there is nothing to score before")


def _verify(
    dtype: str,
    forward: modes.Forward,
    store: ReferenceStore | None,
    wanted: Mapping[str, filling.Wanted],
    sets: Mapping[str, Pairs],
    count: int,
    packing: Packing,
    device: torch.device,
) -> None:
    """Score a sample again, and compare per answer token."""
    draws = distributed.broadcast_object(int(np.random.SeedSequence().generate_state(1)[0]))
    total = sum(len(pairs) for pairs in sets.values())
    sample = np.sort(np.random.default_rng(draws).choice(total, min(count, total), replace=False))
    stored, worst, start, missing = filling.tables(store, wanted, sets, device), 0.0, 0, 0
    for name, pairs in sets.items():
        rows = sample[(sample >= start) & (sample < start + len(pairs))] - start
        start += len(pairs)
        known = stored[name][rows].cpu()
        here = ~known.isnan().any(dim=1)
        missing += int((~here).sum())
        fresh = filling.score_rows(forward, pairs, rows, packing, device)
        tokens = torch.from_numpy(pairs.lengths[rows, 1:]).float().repeat(1, 2)
        off = ((fresh - known).abs() / tokens.clamp(min=1))[here]
        worst = float(np.maximum(worst, off.max().item() if len(off) else 0.0))  # a NaN stays one
    line = f"reference: {len(sample) - missing} pairs scored again, largest difference {worst:.2g} nats per token"
    if not worst <= ROUNDING[dtype]:
        raise NumericFault(f"{line}; allowed: {ROUNDING[dtype]:g}. Delete the store and score anew")
    distributed.log(line)
