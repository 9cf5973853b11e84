"""Held-out pairs under any model, without a run: `dspref evaluate`. Every rank runs this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dspref import distributed
from dspref.config import DataSection, ModelSection, shipped
from dspref.config.strategy import stage_of
from dspref.data import vocabulary
from dspref.data.loader import Packing, sharing_pays
from dspref.data.mismatched import Pairs
from dspref.data.origin import rows_at
from dspref.data.rows import BadRow
from dspref.data.sources import Listing
from dspref.data.store import PairStore
from dspref.engine import ds_config, engine
from dspref.engine.engine import Still
from dspref.errors import ConfigError
from dspref.model import adapters, loading, packed
from dspref.objectives import Objective, RunningMean, build_objective
from dspref.objectives.families import PairLoss
from dspref.reference import modes, spec
from dspref.reference.spec import ReferenceSpec
from dspref.report import console
from dspref.training import demand, named, preparation
from dspref.training.evaluate import evaluate
from dspref.training.gradient import StepLoss
from dspref.training.named import Named

SUBSET = "subset"


@dataclass(frozen=True)
class Asked:
    """What is evaluated, in the sections of a config. `reference`: as the run would have it."""

    model: ModelSection
    data: DataSection
    objective: Mapping[str, Any]
    reference: ReferenceSpec
    seed: int
    run: Path
    """The run folder, where random weights lie once they are drawn."""


def held_out(asked: Asked, source: str | None = None) -> dict[str, Any]:
    """The metrics that an evaluation of the run writes, of the model that `source` names, or of the one that the run begins
    with; with accuracies by `subset`, where the rows have that column.

    {"model", "objective", "reference", "sets": {name: {"pairs", "unit", "metrics", "subsets", "mean_over_subsets"}}}; of the
    `unit` examples an answer stands alone in some pairs.
    """
    if not asked.data.eval_sources:
        raise ConfigError("data.eval: names no held-out pairs; give a file, such as data.eval=held-out.jsonl")
    distributed.init(asked.seed)
    device = engine.bring_up(asked.model.dtype)
    loading.quiet()
    objective = build_objective(**asked.objective)
    with ExitStack() as stack:
        found = distributed.on_main(lambda: tuple(stack.enter_context(_opened(asked, source))))
        subject = Named(*distributed.broadcast_object(list(found or ())))
        section = named.section_of(subject, asked.model) if source else _beginning(asked, subject)
        section = section.model_copy(update={"tokenizer_name_or_path": _tokenizer_of(asked, section, subject)})
        reference = apart(asked.reference)
        kernel, _, sets, listings = preparation.prepare_held_out(section, asked.data, reference, device.type)
        data = preparation.laid_out(section, asked.data)
        packing = _packing(data, list(sets.values()), objective)
        base = _reference(reference, asked, demand.with_mismatched(objective, sets), packing, device)
        policy = _load(section, kernel, objective, reference, device.type)
        judged: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def keep(prefix: str, ids: torch.Tensor, value: PairLoss) -> None:
            margins = value.metrics["rewards/chosen"] - value.metrics["rewards/rejected"]
            right = margins > 0
            if value.judged is not None:
                told = value.judged > 0
                ids, right = ids[told], (value.metrics["rewards/accuracies"] / value.judged)[told]
            judged[prefix] = (ids, right)

        loss = StepLoss(objective, policy.module.router_aux_loss_coef, section.router_aux_scope)
        delta = _delta(objective, subject)
        record = evaluate(policy, loss, base, delta, sets, packing, each=keep) or {}
    return {
        "model": source or asked.model.name_or_path,
        "objective": asked.objective["name"],
        "reference": spec.in_words(asked.reference),
        "sets": {
            prefix.rstrip("_"): {
                "pairs": len(store),
                "unit": "pairs" if (store.scored > 0).all() else "examples",
                "metrics": _own(record, prefix, list(sets)),
                **by_subset(store, listings[prefix], *judged[prefix]),
            }
            for prefix, store in sets.items()
        },
    }


# ---------------------------------------------------------------------------------------------------------------------
# The model, its tokenizer, its reference


def _opened(asked: Asked, source: str | None) -> Any:
    if source:
        return named.opened(source, "--model")
    return named.opened(_weights(asked, policy=True))


def _weights(asked: Asked, policy: bool = False) -> str:
    """Where the policy of the run begins, and its reference if that has no name of its own; `policy`: for which it is
    asked. Raises ConfigError where that is random and has not been drawn."""
    if asked.model.init == "pretrained":
        return asked.model.name_or_path
    if not (asked.run / "init").is_dir():
        drawn = f"model.init: random weights are drawn when the run begins, and {asked.run} has none"
        remedy = "name a --model" if policy else "give the output_dir of the run, or a reference.name_or_path"
        raise ConfigError(f"{drawn}{'' if policy else ' for the reference'}; {remedy}")
    return str(asked.run / "init")


def _beginning(asked: Asked, subject: Named) -> ModelSection:
    """The policy before its first step: a fresh adapter adds nothing to its model."""
    own = asked.model.lora if asked.model.lora and asked.model.lora.path else None
    return asked.model.model_copy(update={"name_or_path": subject.folder, "init": "pretrained", "lora": own})


def _tokenizer_of(asked: Asked, section: ModelSection, subject: Named) -> str:
    """Folder or hub id of the tokenizer: the run's where the model has the same vocabulary, else the model's own.

    Raises ConfigError where a reference would have to read tokens of another vocabulary.
    """
    ours = str(shipped(asked.model.tokenizer_name_or_path or asked.model.name_or_path))
    own = subject.folder
    if Path(own).is_dir() and not vocabulary.has_tokenizer(own):
        own = section.name_or_path if subject.is_adapter else ours
    if own == ours or vocabulary.vocabulary(ours) == vocabulary.vocabulary(own, section.trust_remote_code):
        return ours
    if asked.reference.mode != "none":
        remedy = "name a reference of its family (reference.name_or_path), or an objective without one, such as simpo"
        raise ConfigError(f"--model: {subject.folder} has another vocabulary than the reference; {remedy}")
    return own


def apart(own: ReferenceSpec) -> ReferenceSpec:
    """The run's reference as a model beside the one that is evaluated, scored once and stored: the run may have it from the
    policy itself, which here is another."""
    section = own.section
    if own.mode == "none":
        return own
    if section.moved_by:
        whose = "BEMA" if section.moved_by == "bema" else "TR-DPO"
        distributed.log(f"reference: {whose}'s as it was before its first move; the moved one is in no exported model")
    name = section.adapter_name
    if own.mode == "adapter" and section.name_or_path:
        name = name or own.policy.adapter_name
    changes = {"mode": "stored", "offload": "none", "sync_ref_model": False, "bema": None, "adapter_name": name}
    return replace(own, section=section.model_copy(update=changes))


def _reference(
    reference: ReferenceSpec, asked: Asked, sets: Mapping[str, Pairs], packing: Packing, device: torch.device
) -> modes.Reference:
    if reference.mode == "none":
        return modes.Reference(lambda name, batch: None)
    weights = _weights(asked) if spec.begins_as_policy(reference) else asked.model.name_or_path
    digest = distributed.broadcast_object(distributed.on_main(lambda: spec.digest(reference, weights)) or "")
    with console.scoring() as view:
        return modes.apart(reference, modes.InitialWeights(weights, digest), sets, packing, device, view)


def _load(section: ModelSection, kernel: str, objective: Objective, reference: ReferenceSpec, device_type: str) -> Still:
    adapter = adapters.own(section)
    attach = partial(adapters.frozen, source=adapter) if adapter else None
    stage3 = stage_of(reference.strategy) == 3
    zero3 = ds_config.reference_config(reference.strategy, section.dtype, "none") if stage3 else None
    model = loading.load(section, section.name_or_path, kernel, section.dtype, zero3, attach)
    return Still.of(packed.prepare_for_evaluation(model, section, objective.needs_collision), zero3)


def _packing(data: DataSection, stores: Sequence[PairStore], objective: Objective) -> Packing:
    preparation.refuse_for_objective(stores, objective)
    auto = data.prefix_sharing == "auto"
    sharing = any(sharing_pays(store, store.same[:, 0]) for store in stores) if auto else bool(data.prefix_sharing)
    world = distributed.world()
    return Packing(data.tokens_per_pack, sharing, world.rank, world.size, objective.scores_prompt, objective.family.takes)


def _delta(objective: Objective, subject: Named) -> RunningMean:
    """BCO's running mean, which a model does not hold."""
    if not objective.has_running_mean:
        return RunningMean()
    if subject.delta is None:
        distributed.log(
            "objective: the running mean of BCO's rewards is not known of this model; 0 stands for it in the loss"
        )
        return RunningMean()
    return RunningMean(subject.delta, 1)


# ---------------------------------------------------------------------------------------------------------------------
# What is told


def _own(record: Mapping[str, float], prefix: str, prefixes: Sequence[str]) -> dict[str, float]:
    """The metrics of one set, by their plain names."""
    longer = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
    mine = {name: value for name, value in record.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): value for name, value in mine.items() if not (longer and name.startswith(longer))}


def by_subset(store: PairStore, listing: Listing, ids: torch.Tensor, right: torch.Tensor) -> dict[str, Any]:
    """Accuracy of each subset that the rows name, and the mean over these; {} where they name none. `ids`, `right`: of this
    rank's pairs. Every rank takes part."""
    table, _ = distributed.gather_rows(torch.stack([ids.double(), right.double()], dim=1))
    return distributed.broadcast_object(distributed.on_main(partial(_by_subset, store, listing, table.cpu())) or {})


def _by_subset(store: PairStore, listing: Listing, table: torch.Tensor) -> dict[str, Any]:
    rows = rows_at(listing, {store.place(int(i)) for i in table[:, 0].tolist()})
    found: dict[str, list[float]] = {}
    without = 0
    for index, right in table.tolist():
        row = rows.get(store.place(int(index)))
        subset = None if row is None or isinstance(row, BadRow) else row.values.get(SUBSET)
        if subset in (None, "") or isinstance(subset, list | dict):
            without += 1
        else:
            found.setdefault(str(subset), []).append(right)
    if not found:
        return {}
    subsets = {name: {"pairs": len(of), "accuracy": sum(of) / len(of)} for name, of in sorted(found.items())}
    mean = sum(one["accuracy"] for one in subsets.values()) / len(subsets)
    return {"subsets": subsets, "mean_over_subsets": mean, **({"pairs_without_subset": without} if without else {})}
