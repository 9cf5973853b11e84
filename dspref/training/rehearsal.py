"""The largest pack of a run before its first step, forward and backward: where memory does not suffice, that is said now."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from dspref import distributed
from dspref.data.batch import PackedBatch
from dspref.data.loader import Step, StepLoader, count, place
from dspref.errors import EnvironmentFault
from dspref.model.logps import pair_logps
from dspref.objectives import RunningMean
from dspref.training import gradient
from dspref.training.gradient import Instruments
from dspref.training.session import Session

# Steps whose packs are looked at, spread over the run: a thousand take about as long as one step.
STEPS_LOOKED_AT = 1_000


def rehearse(session: Session, loader: StepLoader, done: int, steps: int) -> None:
    """Compute the largest pack of the steps after `done` on every rank at once, with weight 0: gradients stay as they were,
    and so do weights, states and random generators. Raises EnvironmentFault where memory does not suffice."""
    if done >= steps:
        return
    batch = largest_pack(loader, done, steps)
    policy, size = session.policy, f"{len(batch.input_ids):,} tokens, {len(batch.targets):,} of them scored"
    session.watch.beat("dry run")
    try:
        if not _is_finite(session, batch):
            distributed.log("warning: train.dry_run: left out, as a loss of the largest pack is not finite")
            return
        # A share of a step of infinitely many pairs: as a filler's, it adds 0 to every gradient.
        counts = dict.fromkeys(count(loader.store, np.arange(1)), float("inf"))
        step = Step(0, 0.0, 1, [batch], counts, 0.0)  # type: ignore[arg-type]
        devices = [torch.cuda.current_device()] if policy.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            gradient.accumulate(step, policy, session.loss, session.reference, RunningMean(), Instruments())
    except torch.OutOfMemoryError as error:
        raise EnvironmentFault(
            f"the largest pack of the run ({size}) does not fit in memory ({str(error).splitlines()[0]}); lower "
            "data.tokens_per_pack or data.max_length, or see docs/memory.md (train.dry_run)"
        ) from None
    session.watch.beat("dry run")
    distributed.log(f"dry run: the largest pack fits ({size})")


def largest_pack(loader: StepLoader, done: int, steps: int) -> PackedBatch:
    """Among the packs of all ranks, that with the most computed tokens."""
    best: tuple[int, np.ndarray] = (-1, np.arange(0))
    planned, plan = -1, []
    for number in np.unique(np.linspace(done, steps - 1, min(steps - done, STEPS_LOOKED_AT)).astype(int)).tolist():
        epoch, k = divmod(number, loader.steps_per_epoch)
        if epoch != planned:
            plan, planned = loader.epoch(epoch), epoch
        found = place(loader.store, plan[k], loader.packing).largest
        best = max(best, (found, plan[k]), key=lambda entry: entry[0])
    placed = place(loader.store, best[1], loader.packing)
    whole = [ids for of_rank in placed.ids for ids in of_rank]
    alone = [type(placed)([[ids]], 0, 0, 0, 0, 0.0, 0.0) for ids in whole]
    how = replace(loader.packing, rank=0, world_size=1, takes="pairs")
    packs = (next(iter(one.packs(loader.store, how))) for one in alone)
    return max(packs, key=lambda pack: len(pack.input_ids))


def _is_finite(session: Session, batch: PackedBatch) -> bool:
    """Whether the losses of a pack are, on every rank: of those that are not, the gradient is NaN whatever its weight."""
    policy = session.policy
    batch = batch.to(policy.device)
    with policy.rehearsing():
        tokens, _ = policy.forward(batch)
        value = session.loss.objective(pair_logps(tokens, batch), session.reference("train", batch), 0.0)
    bad = sum((~term.values.isfinite()).sum() for term in value.terms.values())
    return not distributed.largest(int(bad))
