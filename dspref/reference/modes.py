"""Where reference log-probs come from: nowhere, a second model, the policy's own model, or a store filled before training.

A `Reference` maps (name of the data set, pack) to the pack's `PairLogps` under the reference, without gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dspref import distributed
from dspref.config import cache_folder
from dspref.config.strategy import stage_of
from dspref.data.batch import PackedBatch
from dspref.data.loader import Packing
from dspref.data.mismatched import Pairs
from dspref.engine import ds_config, engine, finite, memory, sequence
from dspref.engine.engine import Engine
from dspref.model import adapters, admission, alone, generation, loading, packed
from dspref.model.logps import TokenLogps, pair_logps, scored_tokens
from dspref.model.packed import PackedCausalLM
from dspref.model.router import Routing
from dspref.objectives.families import PairLogps
from dspref.reference import filling
from dspref.reference.bema import Bema
from dspref.reference.filling import COLUMNS, Need, View
from dspref.reference.moving import MovingReference, Sides
from dspref.reference.spec import ReferenceSpec, described, policy_can_score, source_in_reference
from dspref.reference.store import ReferenceStore
from dspref.reference.trust_region import TrustRegion

Forward = Callable[[PackedBatch], tuple[TokenLogps, Routing | None]]
# A forward that reads passages, and the model behind it.
Speaker = tuple[generation.Forward, PackedCausalLM]


class InitialWeights(NamedTuple):
    """Where a run began: folder or hub id of the policy's initial weights, and the content of the reference's."""

    weights: str
    reference_digest: str


def mismatched_name(name: str) -> str:
    """The name under which a reference is asked about the mismatched pairs of a data set."""
    return f"{name}:mismatched"


@dataclass(frozen=True)
class Reference:
    """Answers for packs of named data sets; with `moving`, a reference that is saved and resumed like the policy. `module`:
    the model that is asked; None where none is. `forward`: of a second model, whatever it is asked."""

    logps: Callable[[str, PackedBatch], PairLogps | None]
    moving: MovingReference | None = None
    module: Any = None
    forward: Any = None

    def __call__(self, name: str, batch: PackedBatch) -> PairLogps | None:
        return self.logps(name, batch)

    def follow(self, step: int) -> None:
        """Move after the policy, where the reference moves and that is due after this step."""
        if self.moving:
            self.moving.follow(step)

    def save(self, folder: Path) -> list[Path]:
        return self.moving.save(folder) if self.moving else []

    def load(self, folder: Path) -> None:
        if self.moving:
            self.moving.load(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Live references


def build(
    spec: ReferenceSpec,
    policy: Engine,
    beginning: InitialWeights,
    sets: Mapping[str, Pairs],
    packing: Packing,
    needs: Mapping[str, Need] | None = None,
    view: View = lambda done, total, left: None,
) -> Reference:
    """The reference as its sections ask for it. Must be called while `policy` still has its initial weights.

    `needs`: the pairs of a data set that it will be asked about, where that is not all of them; `view` is told how far a
    scoring is.
    """
    match spec.mode:
        case "none":
            return Reference(lambda name, batch: None)
        case "adapter":
            return Reference(partial(_ask_policy, policy), module=policy.module)
        case "engine":
            forward = load_forward(spec, beginning.weights, policy.device.type)
            moving = _moving(spec, policy, forward)
            module = getattr(forward, "module", forward)  # of a DeepSpeed engine
            return Reference(partial(_ask, forward), moving, module, forward)
        case _:
            return Reference(partial(_read, stored(spec, policy, policy.device, beginning, sets, packing, needs, view)))


def apart(
    spec: ReferenceSpec,
    beginning: InitialWeights,
    sets: Mapping[str, Pairs],
    packing: Packing,
    device: torch.device,
    view: View = lambda done, total, left: None,
) -> Reference:
    """A stored reference beside a model that is not the policy it began as, and cannot stand for it."""
    return Reference(partial(_read, stored(spec, None, device, beginning, sets, packing, None, view)))


@torch.no_grad()
def _ask(forward: Forward, name: str, batch: PackedBatch) -> PairLogps:
    return pair_logps(forward(batch)[0], batch)


def _ask_policy(policy: Engine, name: str, batch: PackedBatch) -> PairLogps:
    with policy.as_reference():
        return pair_logps(policy.score(batch)[0], batch)


def load_forward(spec: ReferenceSpec, weights: str, device_type: str) -> Any:
    """Load the reference model, frozen: sharded by its own ZeRO-3 engine, or whole on each rank."""
    own = spec.section
    default = 3 if stage_of(spec.strategy) == 3 or own.offload == "cpu" else 0
    stage = own.zero_stage if own.zero_stage is not None else default
    section, adapter = described(spec, weights)
    config = loading.load_config(section)
    kernel = admission.check(section, config, spec.max_length, 0, device_type)
    if spec.is_another and (why := admission.why_alone(config, spec.max_length)):
        distributed.log(alone.told(config, why, "reference"))
    zero3 = ds_config.reference_config(spec.strategy, section.dtype, own.offload) if stage == 3 else None
    with_adapter = partial(adapters.frozen, source=adapter) if adapter else None
    reference = loading.load(section, section.name_or_path, kernel, section.dtype, zero3, with_adapter)
    finite.refuse_not_finite(reference.lm, section.dtype, partial(source_in_reference, spec, weights))
    reference.group = sequence.group()
    forward = engine.reference_forward(packed.prepare_as_reference(reference), zero3)
    size, where = memory.weight_bytes(forward)
    how = "sharded by ZeRO-3" if stage == 3 else "whole on each rank"
    distributed.log(f"reference: {how}, {size / 2**20:,.1f} MiB of weights per rank, on {where}")
    return forward


def _moving(spec: ReferenceSpec, policy: Engine, forward: Any) -> MovingReference | None:
    own, ours = spec.section, policy.module.lm
    theirs = getattr(forward, "module", forward).lm  # of a DeepSpeed engine
    if own.bema is not None:
        sides = Sides(ours, theirs, "reference.bema")
        return MovingReference(sides, Bema(sides, own.bema))
    if not own.sync_ref_model:
        return None
    sides = Sides(ours, theirs, "reference.sync_ref_model")
    return MovingReference(sides, TrustRegion(sides, own.ref_model_mixup_alpha, own.ref_model_sync_steps))


@contextmanager
def speaking(spec: ReferenceSpec, reference: Reference, policy: Engine, beginning: InitialWeights) -> Iterator[Speaker]:
    """The reference, or where there is none the policy as it began, for as long as this is open, to be asked for answers.

    Must be called while `policy` still has its initial weights; of a live second model at any time.
    """
    if reference.forward is not None:
        with torch.no_grad():
            yield reference.forward, reference.module
    elif spec.mode in ("adapter", "none") or policy_can_score(spec):
        with policy.as_reference():
            yield policy.read_on, policy.module
    else:
        with scorer(spec, None, beginning.weights, policy.device.type) as forward:
            yield forward, getattr(forward, "module", forward)  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------------------------------
# Stored log-probs


def scoring_packing(spec: ReferenceSpec, packing: Packing, device_type: str) -> Packing:
    """The packs of a pass that keeps nothing for a backward one. On a CPU larger ones are no faster."""
    own, by_default = spec.section.tokens_per_pack, (1 if device_type == "cpu" else 2) * packing.tokens_per_pack
    tokens = own * packing.parts if own else by_default
    return replace(packing, tokens_per_pack=tokens, takes="pairs")  # of whatever, both answers are scored


def stored(
    spec: ReferenceSpec,
    policy: Engine | None,
    device: torch.device,
    beginning: InitialWeights,
    sets: Mapping[str, Pairs],
    packing: Packing,
    needs: Mapping[str, Need] | None,
    view: View,
) -> dict[str, torch.Tensor]:
    """Tables [n, columns] of every data set, scored where the store has not what is needed: no reference stays in memory.
    `policy`: which may stand for the reference; None where there is none."""
    store = open_store(spec, beginning.reference_digest)
    wanted = filling.wanted_of(store, sets, needs)
    ready = partial(scorer, spec, policy, beginning.weights, device.type)
    scored = filling.fill(store, wanted, sets, ready, scoring_packing(spec, packing, device.type), device, view=view)
    filling.report(store, wanted, scored)
    return filling.tables(store, wanted, sets, device)


@contextmanager
def scorer(spec: ReferenceSpec, policy: Engine | None, weights: str, device_type: str) -> Iterator[Forward]:
    """The reference as a forward, for as long as this is open: the policy itself where it can stand for it."""
    if policy and policy_can_score(spec):
        with policy.as_reference():
            yield policy.score
        return
    forward = load_forward(spec, weights, device_type)
    try:
        with torch.no_grad():
            yield forward
    finally:
        engine.discard(forward)


def _read(tables: Mapping[str, torch.Tensor], name: str, batch: PackedBatch) -> PairLogps:
    values = tables[name][batch.pair_ids]
    torch._assert_async(values.isfinite().all(), "a pair was asked about that the run's plan did not name")  # no sync
    sums = dict(zip(COLUMNS, values.unbind(dim=1)))
    chosen_tokens, rejected_tokens, _ = scored_tokens(batch)
    return PairLogps(**sums, chosen_tokens=chosen_tokens, rejected_tokens=rejected_tokens)


def open_store(spec: ReferenceSpec, digest: str) -> ReferenceStore | None:
    """The store of this reference, on rank 0; None on the others, which leave its files alone.

    Its identity is all that decides a value beside the tokens: content of the weights, their type. Paths, kernels, packing
    and world size are not. Raises EnvironmentFault where the folder cannot be read.
    """
    section = described(spec, "").section
    identity = {"weights": digest, "dtype": section.dtype, "load_in_4bit": section.load_in_4bit}
    root = Path(spec.section.store) if spec.section.store else cache_folder("reference")
    store = distributed.on_main(lambda: filling.opened(root, identity))
    if store is not None:
        for name in store.damaged:
            distributed.log(f"warning: {store.folder / name} is damaged; what it held is scored again")
    return store
