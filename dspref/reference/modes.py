"""Where reference log-probs come from: nowhere, a second model, the policy's own model, or a store filled before training.

A `Reference` maps (name of the data set, pack) to the pack's `PairLogps` under the reference, without gradient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dspref import distributed
from dspref.config import Config, ModelSection, cache_folder
from dspref.data.batch import PackedBatch
from dspref.data.loader import Packing
from dspref.data.store import PairStore
from dspref.engine import ds_config, engine, finite, memory
from dspref.engine.engine import Engine
from dspref.model import adapters, admission, loading, packed
from dspref.model.adapters import Saved
from dspref.model.logps import TokenLogps, pair_logps, scored_tokens
from dspref.model.router import Routing
from dspref.objectives import needs_reference
from dspref.objectives.families import PairLogps
from dspref.reference import filling
from dspref.reference.filling import COLUMNS, Need, View
from dspref.reference.store import ReferenceStore
from dspref.reference.trust_region import MovingReference

# How far two passes of one model over a sequence may be apart, in nats per token: what other packs and kernels round.
ROUNDING = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}

Forward = Callable[[PackedBatch], tuple[TokenLogps, Routing | None]]


class Beginning(NamedTuple):
    """Where a run began: folder or hub id of the policy's initial weights, and the content of the reference's."""

    weights: str
    reference_digest: str


@dataclass(frozen=True)
class Reference:
    """Answers for packs of named data sets; with `moving`, a reference that is saved and resumed like the policy. `module`:
    the model that is asked; None where none is."""

    logps: Callable[[str, PackedBatch], PairLogps | None]
    moving: MovingReference | None = None
    sync_steps: int = 0
    module: Any = None

    def __call__(self, name: str, batch: PackedBatch) -> PairLogps | None:
        return self.logps(name, batch)

    def follow(self, step: int) -> None:
        """TR-DPO: move to the policy, after the steps at which that is due."""
        if self.moving and step % self.sync_steps == 0:
            self.moving.sync()

    def save(self, folder: Path) -> list[Path]:
        return self.moving.save(folder) if self.moving else []

    def load(self, folder: Path) -> None:
        if self.moving:
            self.moving.load(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Which reference


def resolve_mode(config: Config) -> str:
    """`auto` is the cheapest mode that is exact: none where the objective needs none, else stored."""
    if config.reference.mode != "auto":
        return config.reference.mode
    if not needs_reference(**config.objective.model_dump()):
        return "none"
    # Offloading is for a model that stays, and what moves cannot be stored.
    return "engine" if config.reference.offload == "cpu" or config.reference.sync_ref_model else "stored"


def describe(config: Config) -> str:
    """The mode, why, and the model, for the banner."""
    own, mode = config.reference, resolve_mode(config)
    if mode == "none":
        return "none needed"
    how = {
        "stored": "scored once, then no model in memory",
        "engine": "a live second model",
        "adapter": "the policy's model, live",
    }[mode]
    if own.sync_ref_model:
        how += f"; TR-DPO, alpha {own.ref_model_mixup_alpha:g} every {own.ref_model_sync_steps} steps"
    elif own.mode == "auto":
        how = "auto: " + (how if mode == "stored" else f"{how}, as reference.offload asks")
    return f"{mode} ({how}): {_who(config)}"


def _who(config: Config) -> str:
    adapter = described(config, "").adapter
    if config.reference.name_or_path and (adapter is None or adapter.path != config.reference.name_or_path):
        return config.reference.name_or_path
    if adapter is None:
        return "the model without its adapter" if config.model.lora else "the initial policy"
    return "the initial policy" if adapter == adapters.own(config.model) else f"adapter {adapter.name} of {adapter.path}"


class Described(NamedTuple):
    """A reference: a model, and the adapter on it, if any."""

    section: ModelSection
    adapter: Saved | None


def described(config: Config, weights: str) -> Described:
    """What the config calls the reference; `weights`: where the policy began."""
    own, policy = config.reference, config.model
    path, name = own.name_or_path, own.adapter_name or policy.adapter_name
    # What is trained of the policy is nothing to the reference, which may be of another family.
    changes: dict[str, Any] = {"router_aux_loss_coef": None, "router_aux_scope": "micro", "gradient_checkpointing": False}
    changes |= {"init": "pretrained", "lora": None, "adapter_name": "default", "dtype": own.dtype or policy.dtype}
    if own.dtype not in (None, policy.dtype):
        changes["attn_implementation"] = "auto"  # the policy's kernel may not know the other type
    if path and (own.mode == "adapter" or own.adapter_name or adapters.is_saved(path, name)):
        adapter = Saved(path, name)
    elif path:
        changes |= {"revision": None, "load_in_4bit": False}
        changes["liger"] = False  # which may not know its family
        return Described(policy.model_copy(update=changes | {"name_or_path": path}), None)
    elif own.adapter_name == "base" or policy.lora is None or policy.lora.path is None:
        adapter = None
    else:
        adapter = Saved(policy.lora.path, name)
    return Described(policy.model_copy(update=changes | {"name_or_path": weights or policy.name_or_path}), adapter)


def first_gap(config: Config) -> float | None:
    """How far reference and policy may differ at the first step, in nats per token, where they are one model in one type, so
    that the first loss is known; None where they are not."""
    lora, off = config.model.lora, config.model.disable_dropout
    if not _policy_can_score(config) or described(config, "").adapter != adapters.own(config.model) or not off:
        return None
    # A fresh adapter adds nothing yet, whatever its dropout; a trained one does.
    silent = lora is None or (lora.init_lora_weights if lora.path is None else off == "all" or lora.lora_dropout == 0)
    return ROUNDING[config.model.dtype] if silent else None


def _policy_can_score(config: Config) -> bool:
    """Whether the policy, before its first step, can stand for the reference: as it is, or with its adapter off."""
    reference = described(config, "")
    same_model = config.reference.name_or_path is None or reference.adapter is not None
    same_type = config.reference.dtype in (None, config.model.dtype)
    return same_model and same_type and reference.adapter in (None, adapters.own(config.model))


def digest(config: Config, weights: str) -> str:
    """The content of the reference, wherever it lies; empty where none is needed."""
    if resolve_mode(config) == "none":
        return ""
    section, adapter = described(config, weights)
    found = loading.content_digest(section)
    return found if adapter is None else hashlib.sha256((found + adapters.digest(adapter)).encode()).hexdigest()


def attach(config: Config) -> Callable[[Any], adapters.Adapters] | None:
    """What puts adapters into the policy's model: the one that is trained, and the reference's where that stays."""
    if config.model.lora is None:
        return None
    live = resolve_mode(config) == "adapter"
    adapter = described(config, "").adapter
    return partial(adapters.for_training, section=config.model, seed=config.train.seed, reference=adapter, live=live)


def source_in_policy(config: Config, weights: str, tensor: str) -> tuple[str, str]:
    """(key of the config, folder) that a tensor of the policy comes from; `weights`: where the policy began."""
    held, lora = adapters.name_in(tensor), config.model.lora
    if held is None or lora is None:
        return "model.name_or_path", weights
    if held != config.model.adapter_name:
        return source_in_reference(config, weights, tensor)
    return ("model.lora.path", lora.path) if lora.path else ("model.lora", "a fresh adapter")


def source_in_reference(config: Config, weights: str, tensor: str) -> tuple[str, str]:
    """The same of a tensor of the reference."""
    own, (section, adapter) = config.reference, described(config, weights)
    if adapter and adapters.name_in(tensor):
        key = "reference.name_or_path" if own.name_or_path else "reference.adapter_name" if own.adapter_name else ""
        return key or "model.lora.path", adapter.path
    return ("model.name_or_path" if own.name_or_path is None or adapter else "reference.name_or_path"), section.name_or_path


# ---------------------------------------------------------------------------------------------------------------------
# Live references


def build(
    config: Config,
    policy: Engine,
    beginning: Beginning,
    sets: Mapping[str, PairStore],
    packing: Packing,
    needs: Mapping[str, Need] | None = None,
    view: View = lambda done, total, left: None,
) -> Reference:
    """The reference as the config wants it. Must be called while `policy` still has its initial weights.

    `needs`: the pairs of a data set that it will be asked about, where that is not all of them; `view` is told how far a
    scoring is.
    """
    match resolve_mode(config):
        case "none":
            return Reference(lambda name, batch: None)
        case "adapter":
            return Reference(partial(_ask_policy, policy), module=policy.module)
        case "engine":
            forward = load_forward(config, beginning.weights, policy.device.type)
            moving = _moving(config, policy, forward)
            module = getattr(forward, "module", forward)  # of a DeepSpeed engine
            return Reference(partial(_ask, forward), moving, config.reference.ref_model_sync_steps, module)
        case _:
            return Reference(partial(_read, stored(config, policy, beginning, sets, packing, needs, view)))


@torch.no_grad()
def _ask(forward: Forward, name: str, batch: PackedBatch) -> PairLogps:
    return pair_logps(forward(batch)[0], batch)


def _ask_policy(policy: Engine, name: str, batch: PackedBatch) -> PairLogps:
    with policy.as_reference():
        return pair_logps(policy.score(batch)[0], batch)


def load_forward(config: Config, weights: str, device_type: str) -> Any:
    """Load the reference model, frozen: sharded by its own ZeRO-3 engine, or whole on each rank."""
    own = config.reference
    default = 3 if config.zero_stage == 3 or own.offload == "cpu" else 0
    stage = own.zero_stage if own.zero_stage is not None else default
    section, adapter = described(config, weights)
    kernel = admission.check(section, loading.load_config(section), config.data.max_length, 0, device_type)
    zero3 = ds_config.reference_config(config.strategy, section.dtype, own.offload) if stage == 3 else None
    with_adapter = partial(adapters.frozen, source=adapter) if adapter else None
    reference = loading.load(section, section.name_or_path, kernel, section.dtype, zero3, with_adapter)
    finite.refuse_not_finite(reference.lm, section.dtype, partial(source_in_reference, config, weights))
    forward = engine.reference_forward(packed.prepare_as_reference(reference), zero3)
    size, where = memory.weight_bytes(forward)
    how = "sharded by ZeRO-3" if stage == 3 else "whole on each rank"
    distributed.log(f"reference: {how}, {size / 2**20:,.1f} MiB of weights per rank, on {where}")
    return forward


def _moving(config: Config, policy: Engine, forward: Any) -> MovingReference | None:
    if not config.reference.sync_ref_model:
        return None
    reference = forward.module if hasattr(forward, "module") else forward  # of a DeepSpeed engine
    return MovingReference(policy.module.lm, reference.lm, config.reference.ref_model_mixup_alpha)


# ---------------------------------------------------------------------------------------------------------------------
# Stored log-probs


def scoring_packing(config: Config, packing: Packing, device_type: str) -> Packing:
    """The packs of a pass that keeps nothing for a backward one. On a CPU larger ones are no faster."""
    own, by_default = config.reference.tokens_per_pack, (1 if device_type == "cpu" else 2) * packing.tokens_per_pack
    return replace(packing, tokens_per_pack=own or by_default)


def stored(
    config: Config,
    policy: Engine,
    beginning: Beginning,
    sets: Mapping[str, PairStore],
    packing: Packing,
    needs: Mapping[str, Need] | None,
    view: View,
) -> dict[str, torch.Tensor]:
    """Tables [n, columns] of every data set, scored where the store has not what is needed: no reference stays in memory."""
    store, device = open_store(config, beginning.reference_digest), policy.device
    wanted = filling.wanted_of(store, sets, needs)
    ready = partial(scorer, config, policy, beginning.weights, device.type)
    scored = filling.fill(store, wanted, sets, ready, scoring_packing(config, packing, device.type), device, view=view)
    filling.report(store, wanted, scored)
    return filling.tables(store, wanted, sets, device)


@contextmanager
def scorer(config: Config, policy: Engine | None, weights: str, device_type: str) -> Iterator[Forward]:
    """The reference as a forward, for as long as this is open: the policy itself where it can stand for it."""
    if policy and _policy_can_score(config):
        with policy.as_reference():
            yield policy.score
        return
    forward = load_forward(config, weights, device_type)
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


def open_store(config: Config, digest: str) -> ReferenceStore | None:
    """The store of this reference, on rank 0; None on the others, which leave its files alone.

    Its identity is all that decides a value beside the tokens: content of the weights, their type. Paths, kernels, packing
    and world size are not. Raises EnvironmentFault where the folder cannot be read.
    """
    section = described(config, "").section
    identity = {"weights": digest, "dtype": section.dtype, "load_in_4bit": section.load_in_4bit}
    root = Path(config.reference.store) if config.reference.store else cache_folder("reference")
    store = distributed.on_main(lambda: filling.opened(root, identity))
    if store is not None:
        for name in store.damaged:
            distributed.log(f"warning: {store.folder / name} is damaged; what it held is scored again")
    return store
