"""Where reference log-probs come from: nowhere, a second model, or a table computed before training.

A `Reference` maps (name of the data set, pack) to the pack's `PairLogps` under the reference, without gradient.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from dspref import distributed, engine, model
from dspref.config import Config
from dspref.data.batch import PackedBatch
from dspref.data.loader import Layout, packs_of
from dspref.data.store import PairStore
from dspref.engine import Engine
from dspref.logps import pair_logps
from dspref.objectives import OBJECTIVES, PairLogps

Reference = Callable[[str, PackedBatch], PairLogps | None]


class Origin(NamedTuple):
    """Where a run began: folder or hub id of the policy's initial weights, and the content of the reference's."""

    weights: str
    reference_digest: str


# A long pass before step 1 says how far it is.
TELL_EVERY_SECONDS = 20

Forward = Callable[[PackedBatch], tuple[torch.Tensor, torch.Tensor]]


def resolve_mode(config: Config) -> str:
    """`auto` is the cheapest mode that is exact: none where the objective needs none, else stored."""
    if config.reference.mode != "auto":
        return config.reference.mode
    if not OBJECTIVES[config.objective.name].needs_reference:
        return "none"
    # Offloading is for a model that stays; asking for it asks for the live one.
    return "engine" if config.reference.offload == "cpu" else "stored"


def equals_policy(config: Config) -> bool:
    """Whether the reference is the policy's initial weights, in the same type, so that the first loss is known."""
    own = config.reference
    return own.name_or_path is None and own.dtype in (None, config.model.dtype) and bool(config.model.disable_dropout)


def describe(config: Config) -> str:
    """The mode and the model, for the banner."""
    mode = resolve_mode(config)
    if mode == "none":
        return "none needed"
    how = {"stored": "scored once before training", "engine": "live"}[mode]
    return f"{mode} ({how}): {config.reference.name_or_path or 'the initial policy'}"


def digest(config: Config, weights: str) -> str:
    """sha256 of the reference's weights, wherever they lie; empty where no reference is needed."""
    if resolve_mode(config) == "none":
        return ""
    own = config.reference.name_or_path
    return model.weights_digest(own or weights, None if own else config.model.revision)


def build(
    config: Config,
    policy: Engine,
    origin: Origin,
    kernel: str,
    sets: Mapping[str, PairStore],
    layout: Layout,
    run_folder: Path,
) -> Reference:
    """The reference as the config wants it. Must be called while `policy` still has its initial weights."""
    match resolve_mode(config):
        case "none":
            return lambda name, batch: None
        case "engine":
            return live(load_forward(config, origin.weights, kernel), policy)
        case _:
            return stored(config, policy, origin, kernel, sets, layout, run_folder)


def live(forward: Forward, policy: Engine) -> Reference:
    """A second model beside the policy, asked for every pack."""

    @torch.no_grad()
    def reference(name: str, batch: PackedBatch) -> PairLogps:
        return pair_logps(forward(batch)[0], batch.span_index, batch.num_pairs)

    return reference


def load_forward(config: Config, weights: str, kernel: str) -> Forward:
    """Load the reference model, frozen: sharded by its own ZeRO-3 engine, or whole on each rank."""
    own = config.reference
    default = 3 if config.zero_stage == 3 or own.offload == "cpu" else 0
    stage = own.zero_stage if own.zero_stage is not None else default
    dtype = own.dtype or config.model.dtype
    zero3 = engine.reference_config(config) if stage == 3 else None
    section = config.model.model_copy(update={"revision": None}) if own.name_or_path else config.model
    reference = model.load(section, own.name_or_path or weights, kernel, dtype, zero3)
    return engine.reference_forward(model.prepare_as_reference(reference), config, stage)


# ---------------------------------------------------------------------------------------------------------------------
# Stored log-probs


def stored(
    config: Config,
    policy: Engine,
    origin: Origin,
    kernel: str,
    sets: Mapping[str, PairStore],
    layout: Layout,
    run_folder: Path,
) -> Reference:
    """Score every data set once, before training, and answer from the table: no reference stays in memory."""
    folder = Path(config.reference.store) if config.reference.store else run_folder / "reference"
    tables: dict[str, torch.Tensor] = {}
    paths = {name: folder / f"{key}.safetensors" for name, key in _keys(config, origin, sets).items()}
    missing = distributed.broadcast_object([name for name, path in paths.items() if not path.exists()])
    if missing:
        tables = _score_all(config, policy, origin, kernel, {name: sets[name] for name in missing}, layout)
        if distributed.world().rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for name, table in tables.items():
                draft = paths[name].with_suffix(".draft")
                save_file({"sums": table}, draft)
                draft.rename(paths[name])
    for name in sets:
        if name not in missing:
            tables[name] = load_file(paths[name])["sums"]
    tables = {name: table.to(policy.device) for name, table in tables.items()}

    def reference(name: str, batch: PackedBatch) -> PairLogps:
        sums = tables[name][batch.pair_ids]
        counts = torch.bincount(batch.span_index, minlength=2 * batch.num_pairs).view(2, -1)
        return PairLogps(sums[:, 0], sums[:, 1], counts[0], counts[1])

    return reference


def _score_all(
    config: Config, policy: Engine, origin: Origin, kernel: str, sets: Mapping[str, PairStore], layout: Layout
) -> dict[str, torch.Tensor]:
    """Sums [n, 2] (chosen, rejected) of each set. The policy itself serves while it still has the reference's weights."""
    if config.reference.name_or_path is None and config.reference.dtype in (None, config.model.dtype):
        with policy.evaluating():
            return {name: score(policy.logps, store, layout, policy.device) for name, store in sets.items()}
    forward = load_forward(config, origin.weights, kernel)
    with torch.no_grad():
        tables = {name: score(forward, store, layout, policy.device) for name, store in sets.items()}
    engine.discard(forward)
    return tables


def score(forward: Forward, store: PairStore, layout: Layout, device: torch.device) -> torch.Tensor:
    """Log-prob sums of every pair of a store: fp32 [n, 2] on the CPU of every rank."""
    sums = torch.zeros(len(store), 2, device=device)
    num_packs, packs, _ = packs_of(store, np.arange(len(store)), layout)
    told = time.monotonic()
    for k, batch in enumerate(packs):
        batch = batch.to(device)
        logps = pair_logps(forward(batch)[0], batch.span_index, batch.num_pairs)
        sums[batch.pair_ids] = torch.stack([logps.chosen, logps.rejected], dim=1)
        if time.monotonic() - told > TELL_EVERY_SECONDS:
            told = time.monotonic()
            distributed.log(f"reference: scored {(k + 1) / num_packs:.0%} of {len(store)} pairs", stamp=True)
    return distributed.all_sum(sums).cpu()  # each pair was scored by one rank, and is zero on the others


def _keys(config: Config, origin: Origin, sets: Mapping[str, PairStore]) -> dict[str, str]:
    """What decides the values: the tokens, the bytes of the weights, their type. Paths and layout do not."""
    identity = {"weights": origin.reference_digest, "dtype": config.reference.dtype or config.model.dtype}
    return {
        name: hashlib.sha256(json.dumps(identity | {"pairs": store.key}, sort_keys=True).encode()).hexdigest()[:32]
        for name, store in sets.items()
    }
