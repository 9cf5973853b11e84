"""What must hold between the keys of a config. Each check yields (path of the key to blame, reason with its remedy).

All checks run, on a config that is wrong elsewhere too: see `sound`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dspref import hints, losses, secrets, strategy
from dspref.errors import ConfigError
from dspref.explain import yaml_word
from dspref.objectives import ASKS, MUTE, OBJECTIVES, as_list, defaults, keys_of, needs_reference
from dspref.paths import shipped
from dspref.sections import Config, ReferenceSection, Section, SourceSection
from dspref.sound import KeyPath, sound

# lr_scheduler_type -> (what lr_scheduler_kwargs may hold, of which at least one is needed)
SCHEDULE_OPTIONS: dict[str, tuple[set[str], set[str]]] = {
    "cosine": ({"num_cycles"}, set()),
    "cosine_with_restarts": ({"num_cycles"}, set()),
    "polynomial": ({"lr_end", "power"}, set()),
    "inverse_sqrt": ({"timescale"}, set()),
    "cosine_with_min_lr": ({"num_cycles", "min_lr", "min_lr_rate"}, {"min_lr", "min_lr_rate"}),
}
# Metrics of every evaluation, behind its prefix.
EVALUATED = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")

# Bounds of a key's range, in pydantic's words.
BOUNDS = {
    "gt": (operator.gt, "greater than"),
    "ge": (operator.ge, "at least"),
    "lt": (operator.lt, "less than"),
    "le": (operator.le, "at most"),
}

# A column of places, 1 being the best.
RANK_NAME = re.compile(r"(^|[._-])rank(s|ing|ings)?$", re.IGNORECASE)

Complaint = tuple[KeyPath, str]

# Far beyond any count of steps, pairs or tokens, and well within 64 bits.
MOST = 10**15

# Of model.lora, what goes with a saved adapter, which brings the rest.
BESIDE_PATH = {"path", "lora_dropout", "merge_on_export"}
# Of reference, what is for some modes only.
ONLY_FOR = {
    "offload": ("engine",),
    "zero_stage": ("engine", "stored"),
    "dtype": ("engine", "stored"),
    "store": ("stored",),
    "tokens_per_pack": ("stored",),
    "sync_ref_model": ("engine",),
}


def complaints(config: Config, document: Any, unsound: Collection[KeyPath] = ()) -> Iterator[Complaint]:
    """What the checks say of a config, but for its keys in `unsound`; one complaint for each key."""
    told = {*unsound}

    def new(found: Iterator[Complaint]) -> Iterator[Complaint]:
        try:
            for path, reason in found:
                if path not in told:
                    told.add(path)
                    yield path, reason
        except AttributeError:
            if not unsound:
                raise

    yield from new(_of_secrets(sound(config, unsound), document))
    of_strategy = list(new(_of_strategy(sound(config, unsound))))
    yield from of_strategy
    # What DeepSpeed cannot run is no ground to judge other keys by.
    unsound = [*unsound, *([("deepspeed",)] if of_strategy else [])]
    for check in CHECKS:
        yield from new(check(sound(config, unsound)))


def _check_numbers(config: Config) -> Iterator[Complaint]:
    """Counts that no run reaches, and that would overflow where they are counted."""
    counted = ("data", "train", "checkpoint", "log", "reference")
    for path, number in _integers({name: getattr(config, name) for name in counted}):
        if abs(number) > MOST:
            yield path, f"{number} is more than anything is counted to; the most is {MOST}"


def _integers(node: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, int]]:
    if isinstance(node, Section):
        node = {name: getattr(node, name) for name in node.__class__.model_fields}
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, inner in items:
        if isinstance(inner, int) and not isinstance(inner, bool) and key != "seed":
            yield (*path, key), inner
        else:
            yield from _integers(inner, (*path, key))


def _of_secrets(config: Config, document: Any) -> Iterator[Complaint]:
    """A config goes to the run folder, the model card and trackers, word for word: what was written, and its strategy."""
    with suppress(AttributeError, ConfigError):
        document = document | {"deepspeed": config.strategy}
    for path, text in texts(document):
        if kind := secrets.kind_of(text):
            yield path, f"holds {kind}, and would be written down with the run; leave secrets to the environment"


def _of_strategy(config: Config) -> Iterator[Complaint]:
    """What is wrong with the DeepSpeed settings, in their own file or in the config."""
    if not config.has_strategy_file:
        yield ("deepspeed",), f"{config.deepspeed}: no such file; {_known_strategies(str(config.deepspeed))}"
        return
    place = f" (in {shipped(config.deepspeed)})" if isinstance(config.deepspeed, str) else ""
    try:
        dtype = config.model.dtype
    except AttributeError:
        dtype = "float32"  # in which every stage goes
    try:
        for path, reason in strategy.problems(config.strategy, dtype):
            yield ("deepspeed", *path), reason + place
    except ConfigError as error:
        yield ("deepspeed",), str(error).replace("deepspeed: ", "", 1)


def _known_strategies(path: str) -> str:
    names = [entry.name for entry in shipped(str(Path(path).parent)).glob("*.json")]
    close = hints.near(Path(path).name, names) if names else None
    return (
        f"did you mean {Path(path).parent / close}?" if close else "ds_configs/README.md lists those that come with dspref"
    )


def texts(node: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Every text below a node, names of keys too, with the path of its key."""
    if isinstance(node, str):
        yield path, node
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield (*path, key), str(key)
            yield from texts(value, (*path, key))
    elif isinstance(node, list):
        for i, item in enumerate(node):
            yield from texts(item, (*path, i))


def _check_lora(config: Config) -> Iterator[Complaint]:
    model, lora = config.model, config.model.lora
    if lora is None:
        if model.adapter_name != "default":
            yield ("model", "adapter_name"), "there is no adapter to name; set model.lora"
        if model.load_in_4bit:
            yield ("model", "load_in_4bit"), "weights in 4 bits cannot be trained; set model.lora, which trains an adapter"
        return
    if lora.path is not None and (others := sorted(lora.model_fields_set - BESIDE_PATH)):
        yield ("model", "lora", others[0]), "the adapter in model.lora.path brings its own; drop the key, or the path"
    if model.disable_dropout == "all" and lora.lora_dropout:
        yield ("model", "lora", "lora_dropout"), "has no effect with model.disable_dropout: all; drop one of them"
    if model.load_in_4bit and config.zero_stage == 3:
        yield (
            ("model", "load_in_4bit"),
            "ZeRO-3 cannot shard weights in 4 bits, each rank would hold them all; use stage 2, or drop load_in_4bit",
        )
    if model.load_in_4bit and config.reference.name_or_path is None:
        for key, value in (("zero_stage", 3), ("offload", "cpu")):
            if getattr(config.reference, key) == value:
                yield ("reference", key), "needs ZeRO-3, which cannot shard weights in 4 bits; use mode: adapter"


def _check_losses(config: Config) -> Iterator[Complaint]:
    section = config.objective
    names, weights = as_list(section.loss_type), getattr(section, "loss_weights", None)
    family = OBJECTIVES[section.name]
    functions = [family.losses[name].function for name in names]
    if repeated := next((name for i, name in enumerate(names) if functions[i] in functions[:i]), None):
        yield ("objective", "loss_type"), f"{repeated} is there twice; give each loss once, with a loss_weight"
    if "sft" in names and section.rpo_alpha is not None:
        yield ("objective", "rpo_alpha"), "adds the loss sft once more; give its weight in loss_weights"
    if weights is not None and not any(weights) and section.rpo_alpha is None:
        yield ("objective", "loss_weights"), "are all 0: nothing would be trained"
    if weights is not None and len(weights) != len(names):
        yield ("objective", "loss_weights"), f"{len(weights)} given, {len(names)} needed: one for each loss of loss_type"


def _check_objective_keys(config: Config) -> Iterator[Complaint]:
    section = config.objective
    family, names = OBJECTIVES[section.name], as_list(section.loss_type)
    given = {key: getattr(section, key) for key in section.model_fields_set if getattr(section, key) is not None}
    applicable = {"name", "loss_type", "loss_weights", *defaults(section.name, names)}
    for key in sorted(given.keys() - applicable):
        takers = [name for name, loss in family.losses.items() if key in keys_of(loss.function)]
        yield ("objective", key), f"does not apply to loss_type {', '.join(names)}; it is for {', '.join(takers)}"
    for key, (suits, why) in ASKS.items():
        neutral = keys_of(family.assemble)[key].default if key in keys_of(family.assemble) else None
        unfit = next((name for name in names if not suits(family.losses[name])), None)
        if key in given and given[key] != neutral and unfit:
            yield ("objective", key), f"{yaml_word(given[key])} does not go with loss_type {unfit}, which {why}"
    if names == ["sft"]:
        for key in sorted(given.keys() & {"use_weighting", "ld_alpha", "f_divergence_type"}):
            if given[key] != keys_of(family.assemble)[key].default:
                yield ("objective", key), "has no effect on loss_type sft, which compares nothing"
    for name in names:
        for key, parameter in keys_of(family.losses[name].function).items():
            if key in given and (bound := exceeded(given[key], parameter.annotation)):
                yield ("objective", key), f"must be {bound} for loss_type {name}, not {given[key]}"
    for key in sorted(given.keys() & MUTE.keys() & applicable):
        if not MUTE[key][0](section.model_dump()):
            yield ("objective", key), f"has no effect: {MUTE[key][1]}"


def exceeded(value: float, annotation: str) -> str | None:
    """The bound of a key's own range that `value` breaks, in words; None if it lies within."""
    ranges = getattr(vars(losses).get(annotation), "__metadata__", ({},))[0]
    return next(
        (
            f"{word} {ranges[key]:g}"
            for key, (holds, word) in BOUNDS.items()
            if key in ranges and not holds(value, ranges[key])
        ),
        None,
    )


def _check_reference_needed(config: Config) -> Iterator[Complaint]:
    section, reference = config.objective, config.reference
    needed = needs_reference(**section.model_dump())
    name = f"{section.name} with reference_free" if getattr(section, "reference_free", False) else section.name
    if needed and reference.mode == "none":
        yield ("reference", "mode"), f"objective {name} needs a reference; use auto, stored or engine"
    if not needed and reference.mode not in ("auto", "none"):
        yield ("reference", "mode"), f"objective {name} uses no reference; drop the key, or set none"
    for key, field in ReferenceSection.model_fields.items():
        if not needed and key != "mode" and getattr(reference, key) != field.default:
            yield ("reference", key), f"objective {name} uses no reference; drop the key"


def _check_lengths(config: Config) -> Iterator[Complaint]:
    data = config.data
    if data.max_length and data.max_prompt_length and data.max_prompt_length >= data.max_length:
        yield ("data", "max_prompt_length"), f"must be below max_length ({data.max_length}), or no answer token fits"
    if data.min_prompt_length:
        if not data.max_length:
            yield (
                ("data", "min_prompt_length"),
                "has no effect without max_length, as nothing makes a prompt shrink; drop it",
            )
        elif data.min_prompt_length >= data.max_length:
            yield ("data", "min_prompt_length"), f"must be below max_length ({data.max_length}), or no answer token fits"
        elif data.max_prompt_length and data.min_prompt_length > data.max_prompt_length:
            yield ("data", "min_prompt_length"), f"must not be above max_prompt_length ({data.max_prompt_length})"
    if data.on_overlong == "truncate":
        return
    if not (data.max_length or data.max_prompt_length or data.max_completion_length):
        yield ("data", "on_overlong"), "has no effect where no length is limited; set max_length, or drop it"
    for key in ("min_prompt_length", "truncation_mode"):
        if getattr(data, key) != type(data).model_fields[key].default:
            yield ("data", key), f"has no effect with on_overlong: {data.on_overlong}, which cuts nothing; drop one of them"


def _check_sources(config: Config) -> Iterator[Complaint]:
    data = config.data
    if not data.shuffle and data.keep_together != "row":
        yield ("data", "keep_together"), "has no effect with shuffle: false, which keeps the order of the files"
    several = isinstance(data.train, list)
    for number, source in enumerate(data.train_sources):
        yield from _check_source(source, ("data", "train", number) if several else ("data", "train"))
    named = isinstance(data.eval, Mapping)
    for name, source in data.source_keys("eval").items():
        yield from _check_source(source, ("data", "eval", name.removeprefix("data.eval.")) if named else ("data", "eval"))


def _check_source(source: SourceSection, own: tuple[str | int, ...]) -> Iterator[Complaint]:
    """Keys of one source that exclude each other, or would have no effect."""
    columns = source.columns.named
    ranked = [key for key in ("completions", "scores", "ranks") if key in columns]
    answers = [key for key in ("chosen", "rejected") if key in columns]
    if source.template and source.pairs != "all":
        yield (*own, "pairs"), "is for rows of completions; a template makes one pair of a row"
    elif source.template and ranked:
        yield (*own, "columns", ranked[0]), "is for rows of completions; a template makes one pair of a row"
    elif source.template and (unread := sorted(columns.keys() - {"tools"})):
        yield (*own, "columns", unread[0]), "has no effect beside a template, which makes the texts; drop one of them"
    elif ranked and answers:
        yield (
            (*own, "columns", answers[0]),
            f"holds one of two answers, columns.{ranked[0]} belongs to several; name one or the other",
        )
    if {"scores", "ranks"} <= columns.keys():
        yield (*own, "columns", "ranks"), "give scores (higher is better) or ranks (1 is the best), not both"
    elif "scores" in columns and RANK_NAME.search(columns["scores"]):
        yield (
            (*own, "columns", "scores"),
            "names a rank, and of scores the higher is the better; use columns.ranks (1 is the best)",
        )
    if source.template and source.template.system is not None and source.as_ == "text":
        yield (*own, "template", "system"), "has no effect with as: text; drop it, or write it into template.prompt"
    twice = sorted(key for key, name in columns.items() if list(columns.values()).count(name) > 1)
    if twice:
        yield (*own, "columns", twice[1]), f"names the column of {twice[0]} once more"


def _check_schedule(config: Config) -> Iterator[Complaint]:
    train = config.train
    if {"warmup_ratio", "warmup_steps"} <= train.model_fields_set and train.warmup_steps is not None:
        yield ("train", "warmup_steps"), "give warmup_steps or warmup_ratio, not both"
    if train.eval_every and not config.data.eval:
        yield ("train", "eval_every"), "there is nothing to evaluate; set data.eval"
    asked = train.warmup_steps or ("warmup_ratio" in train.model_fields_set and train.warmup_ratio)
    if train.lr_scheduler_type == "constant" and asked:
        yield ("train", "lr_scheduler_type"), "constant has no warm-up; use constant_with_warmup"
    known, needed = SCHEDULE_OPTIONS.get(train.lr_scheduler_type, (set(), set()))
    for key in sorted(set(train.lr_scheduler_kwargs) - known):
        yield ("train", "lr_scheduler_kwargs"), f"{train.lr_scheduler_type} takes no {key}; it takes {_names(known)}"
    if needed and not needed & set(train.lr_scheduler_kwargs):
        yield ("train", "lr_scheduler_kwargs"), f"{train.lr_scheduler_type} needs {_names(needed)}"


def _names(keys: set[str]) -> str:
    return " or ".join(sorted(keys)) or "none"


def _check_best(config: Config) -> Iterator[Complaint]:
    best, sets = config.checkpoint.keep_best, config.data.eval_sources
    if best is None:
        return
    if not sets:
        yield ("checkpoint", "keep_best"), "there is nothing to evaluate; set data.eval"
    elif best not in {prefix + name for prefix in sets for name in _evaluated(config)}:
        yield ("checkpoint", "keep_best"), f"no such metric; for example {next(iter(sets))}rewards/margins"
    elif not config.train.eval_every or (config.checkpoint.save_every or 0) % config.train.eval_every:
        yield (
            ("checkpoint", "keep_best"),
            "needs an evaluation at every checkpoint: save_every a multiple of train.eval_every",
        )


def _evaluated(config: Config) -> set[str]:
    section = config.objective
    names = as_list(section.loss_type)
    has_nll = section.name != "dpo" or "sft" in names or section.rpo_alpha is not None
    return {*EVALUATED, *(f"loss/{name}" for name in names), *(["nll_loss"] if has_nll else [])}


def _check_reference(config: Config) -> Iterator[Complaint]:
    reference = config.reference
    if reference.offload == "cpu" and reference.zero_stage == 0:
        yield ("reference", "offload"), "cpu offload needs reference.zero_stage 3"
    if reference.mode == "stored" and reference.offload == "cpu":
        yield (
            ("reference", "offload"),
            "stored log-probs leave no reference in memory; drop offload or use mode: engine",
        )
    if reference.mode == "stored" and reference.sync_ref_model:
        yield ("reference", "sync_ref_model"), "moves the reference, and stored log-probs are those of one; use mode: engine"
    if reference.mode == "adapter" and config.model.lora is None:
        yield ("reference", "mode"), "adapter needs a policy with an adapter (model.lora); use stored or engine"
    live = reference.offload == "cpu" or reference.sync_ref_model  # what makes `auto` an engine
    mode = reference.mode if reference.mode != "auto" else "engine" if live else "stored"
    for key, modes in ONLY_FOR.items():
        unset = ReferenceSection.model_fields[key].default
        if mode not in ("none", *modes) and getattr(reference, key) != unset:
            yield ("reference", key), f"has no effect with mode: {mode}; it is for {' and '.join(modes)}"
    if reference.adapter_name == "base" and reference.name_or_path:
        yield ("reference", "adapter_name"), "base is the policy's own model; drop it, or reference.name_or_path"
    if reference.adapter_name and reference.name_or_path is None:
        if config.model.lora is None:
            yield ("reference", "adapter_name"), "names no adapter without model.lora or reference.name_or_path"
        elif config.model.lora.path is None and reference.adapter_name != "base":
            yield ("reference", "adapter_name"), "needs the folder it lies in: reference.name_or_path or model.lora.path"


def _check_sync(config: Config) -> Iterator[Complaint]:
    reference = config.reference
    if not reference.sync_ref_model:
        for key in sorted(reference.model_fields_set & {"ref_model_mixup_alpha", "ref_model_sync_steps"}):
            if getattr(reference, key) != ReferenceSection.model_fields[key].default:
                yield ("reference", key), "has no effect without sync_ref_model: true"
        return
    blamed = ("reference", "sync_ref_model")
    if config.model.lora:
        yield blamed, "mixes weights of policy and reference; the mean of two adapters is not the adapter of the mean"
    if config.zero_stage == 3 and reference.zero_stage == 0:
        yield blamed, "under ZeRO-3 the policy is in shards, and so must be what follows it; drop reference.zero_stage"
    if strategy.device_of(config.strategy, "offload_param") == "nvme":
        yield blamed, "reads the policy's shards, which offload_param puts on nvme; use device: cpu"


def _check_optimizer(config: Config) -> Iterator[Complaint]:
    offloaded = strategy.offloads_optimizer(config.strategy)
    if config.train.optim == "cpu_adam" and not offloaded:
        yield ("train", "optim"), "cpu_adam is for states in host memory; set offload_optimizer, or use adamw"
    elif config.train.optim == "adamw_8bit" and offloaded:
        yield ("train", "optim"), "adamw_8bit keeps its states on the GPU; drop offload_optimizer, or use adamw"


CHECKS: tuple[Callable[[Config], Iterator[Complaint]], ...] = (
    _check_numbers,
    _check_lora,
    _check_losses,
    _check_objective_keys,
    _check_reference_needed,
    _check_lengths,
    _check_sources,
    _check_schedule,
    _check_best,
    _check_reference,
    _check_sync,
    _check_optimizer,
)
