"""Where reference log-probs come from: nowhere, a second model, or a table computed before training.

A `Reference` maps (name of the data set, pack) to the pack's `PairLogps` under the reference, without gradient.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dspref import admission, distributed, engine, model
from dspref.config import Config, ModelSection
from dspref.data.batch import PackedBatch
from dspref.data.loader import Layout, sweep
from dspref.data.store import PairStore
from dspref.engine import Engine
from dspref.families import PairLogps
from dspref.logps import TokenLogps, pair_logps, scored_tokens
from dspref.objectives import needs_reference
from dspref.router import Routing

Reference = Callable[[str, PackedBatch], PairLogps | None]


class Origin(NamedTuple):
    """Where a run began: folder or hub id of the policy's initial weights, and the content of the reference's."""

    weights: str
    reference_digest: str


# A long pass before step 1 says how far it is.
TELL_EVERY_SECONDS = 20

Forward = Callable[[PackedBatch], tuple[TokenLogps, Routing | None]]
# Columns of a table of reference log-probs: what every objective needs of a pair.
COLUMNS = ("chosen", "rejected", "chosen_common", "rejected_common")


def resolve_mode(config: Config) -> str:
    """`auto` is the cheapest mode that is exact: none where the objective needs none, else stored."""
    if config.reference.mode != "auto":
        return config.reference.mode
    if not needs_reference(**config.objective.model_dump()):
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


def section(config: Config, weights: str) -> ModelSection:
    """The reference as a model section: the policy's, with its own name and type where the config gives them."""
    own = config.reference
    changes: dict[str, Any] = {"name_or_path": own.name_or_path or weights, "init": "pretrained"}
    # What is trained of the policy is nothing to the reference, which may be of another family.
    changes |= {"router_aux_loss_coef": None, "router_aux_scope": "micro", "gradient_checkpointing": False}
    changes["dtype"] = own.dtype or config.model.dtype
    if own.name_or_path:
        changes["revision"] = None
    if own.dtype not in (None, config.model.dtype):
        changes["attn_implementation"] = "auto"  # the policy's kernel may not know the other type
    return config.model.model_copy(update=changes)


def digest(config: Config, weights: str) -> str:
    """The content of the reference, wherever it lies; empty where none is needed."""
    return "" if resolve_mode(config) == "none" else model.content_digest(section(config, weights))


def build(
    config: Config,
    policy: Engine,
    origin: Origin,
    sets: Mapping[str, PairStore],
    layout: Layout,
    run_folder: Path,
) -> Reference:
    """The reference as the config wants it. Must be called while `policy` still has its initial weights."""
    match resolve_mode(config):
        case "none":
            return lambda name, batch: None
        case "engine":
            return live(load_forward(config, origin.weights, policy.device.type), policy)
        case _:
            return stored(config, policy, origin, sets, layout, run_folder)


def live(forward: Forward, policy: Engine) -> Reference:
    """A second model beside the policy, asked for every pack."""

    @torch.no_grad()
    def reference(name: str, batch: PackedBatch) -> PairLogps:
        return pair_logps(forward(batch)[0], batch)

    return reference


def load_forward(config: Config, weights: str, device_type: str) -> Forward:
    """Load the reference model, frozen: sharded by its own ZeRO-3 engine, or whole on each rank."""
    own = config.reference
    default = 3 if config.zero_stage == 3 or own.offload == "cpu" else 0
    stage = own.zero_stage if own.zero_stage is not None else default
    described = section(config, weights)
    kernel = admission.check(described, model.load_config(described), config.data.max_length, 0, device_type)
    zero3 = engine.reference_config(config) if stage == 3 else None
    reference = model.load(described, described.name_or_path, kernel, described.dtype, zero3)
    return engine.reference_forward(model.prepare_as_reference(reference), config, stage)


# ---------------------------------------------------------------------------------------------------------------------
# Stored log-probs


def stored(
    config: Config,
    policy: Engine,
    origin: Origin,
    sets: Mapping[str, PairStore],
    layout: Layout,
    run_folder: Path,
) -> Reference:
    """Score every data set once, before training, and answer from the table: no reference stays in memory."""
    folder = Path(config.reference.store) if config.reference.store else run_folder / "reference"
    paths = {name: folder / f"{key}.safetensors" for name, key in _keys(config, origin, sets).items()}
    found = {name: _read_table(paths[name], len(store)) for name, store in sets.items()}
    # Rank 0 decides for all: a file system may show a new file to one node before another.
    missing = distributed.broadcast_object([name for name, table in found.items() if table is None])
    if missing:
        scored = _score_all(config, policy, origin, {name: sets[name] for name in missing}, layout)
        distributed.on_main(lambda: _write_tables({paths[name]: table for name, table in scored.items()}))
        found |= scored
    tables = {name: table.to(policy.device) for name, table in found.items() if table is not None}

    def reference(name: str, batch: PackedBatch) -> PairLogps:
        sums = dict(zip(COLUMNS, tables[name][batch.pair_ids].unbind(dim=1)))
        chosen_tokens, rejected_tokens, _ = scored_tokens(batch)
        return PairLogps(**sums, chosen_tokens=chosen_tokens, rejected_tokens=rejected_tokens)

    return reference


def _read_table(path: Path, rows: int) -> torch.Tensor | None:
    """Sums [rows, columns] as they were stored; None where there are none, or what is there is damaged."""
    try:
        table = load_file(path)["sums"]
    except (OSError, SafetensorError, KeyError):
        return None
    return table if table.shape == (rows, len(COLUMNS)) else None


def _write_tables(tables: Mapping[Path, torch.Tensor]) -> None:
    for path, table in tables.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"sums": table}, draft := path.with_suffix(".draft"))
        draft.rename(path)


def _score_all(
    config: Config, policy: Engine, origin: Origin, sets: Mapping[str, PairStore], layout: Layout
) -> dict[str, torch.Tensor]:
    """Sums [n, columns] of each set. The policy itself serves while it still has the reference's weights."""
    if config.reference.name_or_path is None and config.reference.dtype in (None, config.model.dtype):
        with policy.evaluating():
            return {name: score(policy.score, store, layout, policy.device) for name, store in sets.items()}
    forward = load_forward(config, origin.weights, policy.device.type)
    with torch.no_grad():
        tables = {name: score(forward, store, layout, policy.device) for name, store in sets.items()}
    engine.discard(forward)
    return tables


def score(forward: Forward, store: PairStore, layout: Layout, device: torch.device) -> torch.Tensor:
    """Log-prob sums of every pair of a store: fp32 [n, columns] on the CPU of every rank."""
    sums = torch.zeros(len(store), len(COLUMNS), device=device)
    told = time.monotonic()
    for done, batch in sweep(store, layout):
        batch = batch.to(device)
        logps = pair_logps(forward(batch)[0], batch)
        sums[batch.pair_ids] = torch.stack([getattr(logps, name) for name in COLUMNS], dim=1)
        if time.monotonic() - told > TELL_EVERY_SECONDS:
            told = time.monotonic()
            distributed.log(f"reference: scored {done:.0%} of {len(store)} pairs", stamp=True)
    return distributed.all_sum(sums).cpu()  # each pair was scored by one rank, and is zero on the others


def _keys(config: Config, origin: Origin, sets: Mapping[str, PairStore]) -> dict[str, str]:
    """What decides the values: the tokens, the bytes of the weights, their type. Paths and layout do not."""
    identity = {"weights": origin.reference_digest, "dtype": config.reference.dtype or config.model.dtype}
    return {
        name: hashlib.sha256(json.dumps(identity | {"pairs": store.key}, sort_keys=True).encode()).hexdigest()[:32]
        for name, store in sets.items()
    }
