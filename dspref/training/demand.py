"""What a run will ask for: its steps, and the pairs that the policy and the reference see in them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dspref import distributed
from dspref.config import DataSection, TrainSection
from dspref.data.loader import Packing, StepLoader
from dspref.data.mismatched import Mismatched, Pairs
from dspref.data.store import PairStore
from dspref.objectives import Objective
from dspref.reference.filling import Need, whole
from dspref.reference.modes import mismatched_name
from dspref.training import preparation


def plan(
    objective: Objective, data: DataSection, train: TrainSection, pairs: PairStore, held_out: Mapping[str, PairStore]
) -> tuple[Packing, StepLoader]:
    """How packs are laid out over the ranks, and the steps of the run. Raises DataError for pairs that its objective cannot
    train on, or judge."""
    world = distributed.world()
    preparation.refuse_for_objective(list(held_out.values()), objective)
    packing, loader = preparation.steps_of(data, train, pairs, objective, world.rank, world.size, world.sequence)
    total = loader.total_steps(train.num_train_epochs, train.asked_steps)
    return packing, loader.with_mismatched(total) if objective.has_mismatched else loader


def sets(objective: Objective, loader: StepLoader, held_out: Mapping[str, PairStore]) -> dict[str, Pairs]:
    """All that the reference may be asked about, by name: training and held-out pairs, and the mismatched pairs of both
    where the objective has a reference point."""
    of_steps = {mismatched_name("train"): loader.mismatched} if loader.mismatched is not None else {}
    return {"train": loader.store, **with_mismatched(objective, held_out), **of_steps}


def with_mismatched(objective: Objective, held_out: Mapping[str, PairStore]) -> dict[str, Pairs]:
    """Held-out pairs, and where the objective has a reference point the mismatched pairs of each set."""
    if not objective.has_mismatched:
        return {**held_out}
    return {**held_out, **{mismatched_name(name): Mismatched.of_all(pairs) for name, pairs in held_out.items()}}


def needs(loader: StepLoader, sets: Mapping[str, Pairs], done: int, steps: int) -> dict[str, Need]:
    """What the reference is asked about of these `sets`: the pairs of all steps of the run, of which the ones after `done`
    are needed now, and the held-out pairs, as every run ends with an evaluation."""
    rows = loader.pairs_of(0, steps)
    now = np.isin(rows, loader.pairs_of(done, steps)) if done else np.ones(len(rows), dtype=bool)
    found = {name: whole(pairs) for name, pairs in sets.items()} | {"train": Need(rows, now)}
    if (name := mismatched_name("train")) in sets:
        entries = np.arange(len(sets[name]))
        found[name] = Need(entries, entries >= loader.pairs_before(done))
    return found
