"""What must hold between the keys of a config. Each check yields (path of the key to blame, reason with its remedy).

All checks run, on a config that is wrong elsewhere too: see `sound`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from dspref import secrets
from dspref.config import ds_keys, expert_checks, given_checks, hints, objective_checks, outcome_checks, strategy
from dspref.config.objective_checks import Complaint
from dspref.config.paths import shipped
from dspref.config.sections import Config, Section, SourceSection
from dspref.config.sound import KeyPath, sound
from dspref.data import own_format
from dspref.errors import ConfigError

# lr_scheduler_type -> (what lr_scheduler_kwargs may hold, of which at least one is needed)
SCHEDULE_OPTIONS: dict[str, tuple[set[str], set[str]]] = {
    "cosine": ({"num_cycles"}, set()),
    "cosine_with_restarts": ({"num_cycles"}, set()),
    "polynomial": ({"lr_end", "power"}, set()),
    "inverse_sqrt": ({"timescale"}, set()),
    "cosine_with_min_lr": ({"num_cycles", "min_lr", "min_lr_rate"}, {"min_lr", "min_lr_rate"}),
}

# A column of places, 1 being the best.
RANK_NAME = re.compile(r"(^|[._-])rank(s|ing|ings)?$", re.IGNORECASE)

# Far beyond any count of steps, pairs or tokens, and well within 64 bits.
MOST = 10**15

# Columns that a template leaves a place for.
BESIDE_TEMPLATE = {"tools", "source_language", "target_language", *given_checks.NAMES}

# Of model.lora, what goes with a saved adapter, which brings the rest.
BESIDE_PATH = {"path", "lora_dropout", "merge_on_export"}


def complaints(config: Config, document: Any, unsound: Collection[KeyPath] = ()) -> Iterator[Complaint]:
    """What the checks say of a config, but for its keys in `unsound`; one complaint for each key."""
    told = {*unsound}

    def new(check: Callable[[Config], Iterator[Complaint]], unsound: Collection[KeyPath]) -> Iterator[Complaint]:
        try:
            for path, reason in check(sound(config, unsound)):
                if path not in told:
                    told.add(path)
                    yield path, reason
        except AttributeError:
            if not unsound:
                raise

    yield from new(partial(_of_secrets, document=document), unsound)
    yield from new(lambda _: _to_fill_in(document), unsound)
    of_strategy = list(new(_of_strategy, unsound))
    yield from of_strategy
    # What DeepSpeed cannot run is no ground to judge other keys by.
    unsound = [*unsound, *([("deepspeed",)] if of_strategy else [])]
    for check in CHECKS:
        yield from new(check, unsound)


def _check_numbers(config: Config) -> Iterator[Complaint]:
    """Counts that no run reaches, and that would overflow where they are counted."""
    counted = ("data", "train", "parallel", "checkpoint", "log", "reference")
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


def _to_fill_in(document: Any) -> Iterator[Complaint]:
    """What `dspref convert` left open. Paths, which have FILL_IN/ before a word, are looked at with all others."""
    for path, text in texts(document):
        if text == hints.FILL_IN and path != ("deepspeed",):  # which `_of_strategy` tells
            yield path, hints.STILL_OPEN


def _of_strategy(config: Config) -> Iterator[Complaint]:
    """What is wrong with the DeepSpeed settings, in their own file or in the config."""
    if config.deepspeed == hints.FILL_IN:
        yield ("deepspeed",), hints.STILL_OPEN
        return
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


def _check_freeze(config: Config) -> Iterator[Complaint]:
    if config.model.freeze and config.model.lora:
        yield ("model", "freeze"), "an adapter leaves the whole model as it is; drop it, or choose model.lora.target_modules"


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
    if not config.data.shuffle and config.data.keep_together != "row":
        yield ("data", "keep_together"), "has no effect with shuffle: false, which keeps the order of the files"
    for own, source in config.data.placed():
        yield from _check_source(source, own)


def _check_source(source: SourceSection, own: tuple[str | int, ...]) -> Iterator[Complaint]:
    """Keys of one source that exclude each other, or would have no effect; and a format that cannot be had."""
    columns = source.columns.named
    if source.format and (fault := own_format.fault_of(source.format)):
        yield (*own, "format"), fault
    of_texts = columns.keys() - set(given_checks.NAMES)  # those of numbers name what the format gives
    if source.format and (source.template or of_texts):
        beside = ("template",) if source.template else ("columns", min(of_texts))
        yield (*own, *beside), "has no effect beside format, whose function names the fields itself; drop one of them"
    ranked = [key for key in ("completions", "scores", "ranks") if key in columns]
    answers = [key for key in ("chosen", "rejected") if key in columns]
    alone = [key for key in ("completion", "label") if key in columns]
    if source.template and source.pairs != "all":
        yield (*own, "pairs"), "is for rows of completions; a template makes one pair of a row"
    elif source.template and ranked:
        yield (*own, "columns", ranked[0]), "is for rows of completions; a template makes one pair of a row"
    elif source.template and (unread := sorted(columns.keys() - BESIDE_TEMPLATE)):
        yield (*own, "columns", unread[0]), "has no effect beside a template, which makes the texts; drop one of them"
    elif ranked and answers:
        yield (
            (*own, "columns", answers[0]),
            f"holds one of two answers, columns.{ranked[0]} belongs to several; name one or the other",
        )
    elif alone and (ranked or answers):
        yield (
            (*own, "columns", alone[0]),
            f"belongs to one answer that stands alone, columns.{(ranked + answers)[0]} to several; name one or the other",
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
    for key in ("max_steps", "num_train_epochs") if train.overfit else ():
        if key in train.model_fields_set and getattr(train, key) is not None:
            yield ("train", key), "has no effect beside train.overfit, which says the steps; drop one of them"
    if train.eval_at_start is True and not config.data.eval:
        yield ("train", "eval_at_start"), "there is nothing to evaluate; set data.eval"
    asked = train.warmup_steps or ("warmup_ratio" in train.model_fields_set and train.warmup_ratio)
    if train.lr_scheduler_type == "constant" and asked:
        yield ("train", "lr_scheduler_type"), "constant has no warm-up; use constant_with_warmup"
    known, needed = SCHEDULE_OPTIONS.get(train.lr_scheduler_type, (set(), set()))
    for key in sorted(set(train.lr_scheduler_kwargs) - known):
        yield ("train", "lr_scheduler_kwargs"), f"{train.lr_scheduler_type} takes no {key}; it takes {_names(known)}"
    if needed and not needed & set(train.lr_scheduler_kwargs):
        yield ("train", "lr_scheduler_kwargs"), f"{train.lr_scheduler_type} needs {_names(needed)}"


def _check_profile(config: Config) -> Iterator[Complaint]:
    train, steps = config.train, config.train.profile.steps if config.train.profile else [1, 1]
    if len(steps) != 2 or steps[0] > steps[1]:
        yield (
            ("train", "profile", "steps"),
            f"takes the first step and the last one, in that order, such as [5, 8], not {steps}",
        )
    elif steps[1] > (total := train.asked_steps or steps[1]):
        yield ("train", "profile", "steps"), f"there is no step {steps[1]}, the run has {total}; name earlier ones"


def _names(keys: set[str]) -> str:
    return " or ".join(sorted(keys)) or "none"


def _check_optimizer(config: Config) -> Iterator[Complaint]:
    offloaded = strategy.offloads_optimizer(config.strategy)
    if config.train.optim == "cpu_adam" and not offloaded:
        yield ("train", "optim"), "cpu_adam is for states in host memory; set offload_optimizer, or use adamw"
    elif config.train.optim == "adamw_8bit" and offloaded:
        yield ("train", "optim"), "adamw_8bit keeps its states on the GPU; drop offload_optimizer, or use adamw"
    of_keys = strategy.asked(config.strategy)
    if f"{ds_keys.OPTIMIZER}.ratio" in of_keys and config.train.optim != "cpu_adam":
        yield (
            ("deepspeed", *ds_keys.OPTIMIZER.split("."), "ratio"),
            "below 1 DeepSpeed takes no other Adam than its own; set train.optim: cpu_adam, or remove it",
        )
    frozen = f"{ds_keys.ZERO}.zero_quantized_nontrainable_weights"
    if frozen in of_keys and not (config.model.lora or config.model.freeze):
        yield ("deepspeed", *frozen.split(".")), "has no effect without frozen weights; set model.lora, or remove it"


def _check_samples(config: Config) -> Iterator[Complaint]:
    """Prompts that are answered while the policy is trained, and how."""
    log, how = config.log, config.log.generation
    if log.samples and not config.data.eval:
        own = "; log.samples_file alone has its prompts answered" if log.samples_file else ""
        yield ("log", "samples"), f"there is no held-out prompt to answer; set data.eval, or drop it{own}"
    if not log.samples and log.samples_file is None:
        for key in ("sample_every", "generation"):
            if getattr(log, key) != type(log).model_fields[key].default:
                yield (
                    ("log", key),
                    "has no effect without prompts; set log.samples or log.samples_file, or drop it",
                )
    if not how.temperature and how.top_p != 1:
        yield ("log", "generation", "top_p"), "has no effect with temperature: 0, which draws nothing; set one, or drop it"


CHECKS: tuple[Callable[[Config], Iterator[Complaint]], ...] = (
    _check_numbers,
    _check_freeze,
    _check_lora,
    lambda config: objective_checks.check_losses(config.objective),
    lambda config: objective_checks.check_objective_keys(config.objective),
    lambda config: objective_checks.check_unpaired(config.objective, config.data, config.train.pairs_per_step),
    lambda config: objective_checks.check_whole_rows(config.objective, config.data),
    lambda config: objective_checks.check_own(config.objective),
    lambda config: objective_checks.check_reference_needed(config.objective, config.reference),
    _check_lengths,
    _check_sources,
    lambda config: given_checks.check_given(config.data, config.objective),
    _check_schedule,
    _check_profile,
    outcome_checks.check_best,
    outcome_checks.check_stopping,
    outcome_checks.check_hub,
    lambda config: objective_checks.check_reference(config.reference, config.model.lora),
    lambda config: objective_checks.check_sync_keys(config.reference),
    lambda config: objective_checks.check_sync(config.reference, config.zero_stage),
    _check_optimizer,
    lambda config: expert_checks.check_experts(
        config.strategy, config.model, config.parallel, config.reference, config.train.optim
    ),
    _check_samples,
)
