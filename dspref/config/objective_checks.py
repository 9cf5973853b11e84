"""What must hold between the keys of an objective and of its reference: the part of `checks` that knows losses.

Each takes the sections that it reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dspref.config.data_section import DataSection, SourceSection
from dspref.config.explain import yaml_word
from dspref.config.sections import LoraSection, ReferenceSection
from dspref.config.sound import KeyPath
from dspref.objectives import (
    OBJECTIVES,
    as_list,
    build_objective,
    component,
    defaults,
    keys_of,
    known_keys,
    losses,
    needs_reference,
    own,
    trial,
)

Complaint = tuple[KeyPath, str]

# Of reference, what is for some modes only.
ONLY_FOR = {
    "offload": ("engine",),
    "zero_stage": ("engine", "stored"),
    "dtype": ("engine", "stored"),
    "store": ("stored",),
    "tokens_per_pack": ("stored",),
    "sync_ref_model": ("engine",),
    "bema": ("engine",),
}


def check_losses(section: Any) -> Iterator[Complaint]:
    names, weights = as_list(section.loss_type), getattr(section, "loss_weights", None)
    family = OBJECTIVES[section.name]
    functions, logged = [family.loss(name).function for name in names], [component(name) for name in names]
    if repeated := next((name for i, name in enumerate(names) if functions[i] in functions[:i]), None):
        yield ("objective", "loss_type"), f"{repeated} is there twice; give each loss once, with a loss_weight"
    elif repeated := next((name for i, name in enumerate(logged) if name in logged[:i]), None):
        yield (
            ("objective", "loss_type"),
            f"two losses are called {repeated}, and so are their metrics; rename your function",
        )
    if "sft" in names and section.rpo_alpha is not None:
        yield ("objective", "rpo_alpha"), "adds the loss sft once more; give its weight in loss_weights"
    if weights is not None and not any(weights) and section.rpo_alpha is None:
        yield ("objective", "loss_weights"), "are all 0: nothing would be trained"
    if weights is not None and len(weights) != len(names):
        yield ("objective", "loss_weights"), f"{len(weights)} given, {len(names)} needed: one for each loss of loss_type"


def check_objective_keys(section: Any) -> Iterator[Complaint]:
    family, names = OBJECTIVES[section.name], as_list(section.loss_type)
    given = {key: getattr(section, key) for key in section.model_fields_set if getattr(section, key) is not None}
    applicable = {"name", "loss_type", "loss_weights", *defaults(section.name, names)}
    for key in sorted(given.keys() - applicable):
        takers = [name for name, loss in family.losses.items() if key in keys_of(loss.function)]
        yield ("objective", key), f"does not apply to loss_type {', '.join(names)}; it is for {', '.join(takers)}"
    for key, about in known_keys(section.name, names).items():
        neutral = keys_of(family.assemble)[key].default if key in keys_of(family.assemble) else None
        unfit = next((name for name in names if not about.suits(family.loss(name))), None)
        if key in given and given[key] != neutral and unfit:
            yield ("objective", key), f"{yaml_word(given[key])} does not go with loss_type {unfit}, which {about.unsuited}"
    if names == ["sft"]:
        for key in sorted(given.keys() & {"use_weighting", "ld_alpha", "f_divergence_type"}):
            if given[key] != keys_of(family.assemble)[key].default:
                yield ("objective", key), "has no effect on loss_type sft, which compares nothing"
    for name in names:
        for key, parameter in keys_of(family.loss(name).function).items():
            if key in given and (bound := exceeded(given[key], parameter.annotation)):
                yield ("objective", key), f"must be {bound} for loss_type {name}, not {given[key]}"
    for key, about in sorted(known_keys(section.name, names).items()):
        if key in given and key in applicable and not about.has_effect(section.model_dump()):
            yield ("objective", key), f"has no effect: {about.muted}"


def check_unpaired(section: Any, data: DataSection, pairs_per_step: int) -> Iterator[Complaint]:
    """What single answers need: an objective that takes them, and of KTO others in the step."""
    objective = build_objective(**section.model_dump())
    takers = [name for name, family in OBJECTIVES.items() if family.takes == "answers"]
    for place, source in data.placed():
        column = next((name for name in ("completion", "label") if name in source.columns.named), None)
        if column and section.name not in takers:
            reason = f"is for answers that stand alone, and {section.name} compares two; set objective.name: "
            yield (*place, "columns", column), reason + " or ".join(takers)
    if objective.has_mismatched and pairs_per_step < 2:
        reason = "1 leaves no other answer in the step to estimate the reference point from; set 2 or more, such as 128"
        yield ("train", "pairs_per_step"), reason


def check_whole_rows(section: Any, data: DataSection) -> Iterator[Complaint]:
    """Lists and gold answers need an objective that takes them, and lists all of their answers."""
    takes = OBJECTIVES[section.name].takes
    if OBJECTIVES[section.name].by_rows and data.keep_together == "none":
        yield (
            ("data", "keep_together"),
            f"none has no effect: with {section.name} all that a row gives is in one step; drop it",
        )
    for place, source in data.placed():
        if source.pairs == "list" and takes != "list":
            yield (*place, "pairs"), f"list makes lists, and {section.name} compares two; set objective.name: listwise"
        if source.pairs not in ("all", "list") and takes == "list":
            yield (*place, "pairs"), f"{source.pairs} makes pairs, and listwise takes all answers of a row; drop it"
        if source.pair_weights and takes == "list":
            yield (*place, "pair_weights"), "weighs pairs, and listwise has lists; columns.weight weighs these"
        texts = source.template
        if (key := _place_of_gold(source)) and takes != "gold":
            yield (*place, *key), f"is the gold answer of objective tpo; {section.name} has no place for it"
        if takes == "gold" and texts and texts.reference is None:
            yield (*place, "template", "reference"), "missing: tpo trains on a gold answer beside the pair; give its text"


def _place_of_gold(source: SourceSection) -> tuple[str, str] | None:
    """The key that says where the gold answer is."""
    if source.columns.reference:
        return "columns", "reference"
    return ("template", "reference") if source.template and source.template.reference is not None else None


def check_own(section: Any) -> Iterator[Complaint]:
    """A loss of the user's own is tried out with the keys that it has here."""
    for number, part in enumerate(build_objective(**section.model_dump()).parts):
        if own.is_own(part.name):
            place = (number,) if isinstance(section.loss_type, list) else ()
            if fault := trial.fault_of(part.name, part.loss, part.keys, OBJECTIVES[section.name].of_ratios):
                yield ("objective", "loss_type", *place), fault


def exceeded(value: float, annotation: Any) -> str | None:
    """The bound of a key's own range that `value` breaks, in words; None if it lies within."""
    kind = vars(losses).get(annotation) if isinstance(annotation, str) else annotation
    return losses.exceeded(value, getattr(kind, "__metadata__", ({},))[0])


def check_reference_needed(section: Any, reference: ReferenceSection) -> Iterator[Complaint]:
    needed = needs_reference(**section.model_dump())
    name = f"{section.name} with reference_free" if getattr(section, "reference_free", False) else section.name
    if needed and reference.mode == "none":
        yield ("reference", "mode"), f"objective {name} needs a reference; use auto, stored or engine"
    if not needed and reference.mode not in ("auto", "none"):
        yield ("reference", "mode"), f"objective {name} uses no reference; drop the key, or set none"
    for key, field in ReferenceSection.model_fields.items():
        if not needed and key != "mode" and getattr(reference, key) != field.default:
            yield ("reference", key), f"objective {name} uses no reference; drop the key"


def check_reference(reference: ReferenceSection, lora: LoraSection | None) -> Iterator[Complaint]:
    if reference.offload == "cpu" and reference.zero_stage == 0:
        yield ("reference", "offload"), "cpu offload needs reference.zero_stage 3"
    if reference.mode == "stored" and reference.offload == "cpu":
        yield (
            ("reference", "offload"),
            "stored log-probs leave no reference in memory; drop offload or use mode: engine",
        )
    if reference.mode == "stored" and (moved_by := reference.moved_by):
        yield ("reference", moved_by), "moves the reference, and stored log-probs are those of one; use mode: engine"
    if reference.mode == "adapter" and lora is None:
        yield ("reference", "mode"), "adapter needs a policy with an adapter (model.lora); use stored or engine"
    if lora and (moved_by := reference.moved_by):
        reason = "mixes weights of policy and reference; the mean of two adapters is not the adapter of the mean"
        yield ("reference", moved_by), f"{reason}; drop it, or model.lora"
    live = reference.offload == "cpu" or reference.moved_by  # what makes `auto` an engine
    mode = reference.mode if reference.mode != "auto" else "engine" if live else "stored"
    for key, modes in ONLY_FOR.items():
        unset = ReferenceSection.model_fields[key].default
        if mode not in ("none", *modes) and getattr(reference, key) != unset:
            yield ("reference", key), f"has no effect with mode: {mode}; it is for {' and '.join(modes)}"
    if reference.adapter_name == "base" and reference.name_or_path:
        yield ("reference", "adapter_name"), "base is the policy's own model; drop it, or reference.name_or_path"
    if reference.adapter_name and reference.name_or_path is None:
        if lora is None:
            yield ("reference", "adapter_name"), "names no adapter without model.lora or reference.name_or_path"
        elif lora.path is None and reference.adapter_name != "base":
            yield ("reference", "adapter_name"), "needs the folder it lies in: reference.name_or_path or model.lora.path"


def check_sync(reference: ReferenceSection, zero_stage: int) -> Iterator[Complaint]:
    if reference.moved_by and zero_stage == 3 and reference.zero_stage == 0:
        yield (
            ("reference", reference.moved_by),
            "under ZeRO-3 the policy is in shards, and so must be what follows it; drop reference.zero_stage",
        )


def check_sync_keys(reference: ReferenceSection) -> Iterator[Complaint]:
    bema = reference.bema
    if bema is not None and reference.sync_ref_model:
        yield ("reference", "bema"), "moves the reference, and so does sync_ref_model (TR-DPO); give one of them"
    if bema is not None and bema.moves_every % bema.update_freq:
        place = ("reference", "bema", "ref_model_update_freq")
        yield place, f"must be a multiple of update_freq, {bema.update_freq}: the average is of those steps"
    for key in sorted(reference.model_fields_set & {"ref_model_mixup_alpha", "ref_model_sync_steps"}):
        if not reference.sync_ref_model and getattr(reference, key) != ReferenceSection.model_fields[key].default:
            yield ("reference", key), "has no effect without sync_ref_model: true"
