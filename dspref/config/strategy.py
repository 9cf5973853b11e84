"""What a DeepSpeed JSON may say in dspref: how memory and communication are laid out, and nothing else.

DeepSpeed ignores unknown top-level keys and turns `"auto"` into a default without a word, so both are refused here, and
so is what it would ignore at the stage of the run. `ds_keys` has the tables. Loads neither torch nor deepspeed.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dspref import reading
from dspref.config.ds_keys import (
    BESIDE_EXPERTS,
    BY_PATH,
    EXPERTS,
    KEYS,
    ON_DISK,
    REFUSED,
    SECTIONS,
    UNPROVEN,
    UNREAD_IN_BF16,
    WHOLE_REDUCTION,
    ZERO,
    Key,
    names_in,
)
from dspref.errors import ConfigError

# Keys that another section of the YAML owns, and where.
OWNED = {
    "train_batch_size": "train.pairs_per_step",
    "train_micro_batch_size_per_gpu": "data.tokens_per_pack",
    "gradient_accumulation_steps": "data.tokens_per_pack",
    "managed_gradient_accumulation": "dspref, which steps once per global batch",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.optim, train.learning_rate, ...",
    "scheduler": "train.lr_scheduler_type",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "fp32": "model.dtype",
    "torch_autocast": "model.dtype",
    "amp": "model.dtype",
    "data_types": "dspref, which accumulates gradients in fp32",
    "steps_per_print": "log.every",
    "wandb": "log.trackers",
    "tensorboard": "log.trackers",
    "csv_monitor": "metrics.jsonl",
    "activation_checkpointing": "model.gradient_checkpointing",
    "checkpoint": "checkpoint",
    "seed": "train.seed",
}


class Problem(NamedTuple):
    """What is wrong with a strategy: the path of the key, and the reason with its remedy."""

    path: tuple[str, ...]
    reason: str


def load(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON. Raises ConfigError with file, line and column."""
    try:
        strategy = reading.read_json(path)
    except FileNotFoundError:
        raise ConfigError(
            f"deepspeed: {path}: no such file; ds_configs/README.md lists those that come with dspref"
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}:{error.colno}: deepspeed: not valid JSON: {error.msg}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"deepspeed: {path}: cannot be read: {reading.words(error)}") from None
    if not isinstance(strategy, dict):
        raise ConfigError(f"{path}:1:1: deepspeed: must hold one JSON object")
    return strategy


def problems(strategy: Mapping[str, Any], dtype: str) -> list[Problem]:
    """Why DeepSpeed cannot run this strategy in `dtype`, or would run it wrongly, one for each key; none if it can."""
    found = [*_unknown_keys(strategy, ()), *_misread_values(strategy, ())]
    # Whoever misspelt what combinations hang on is not told that it is missing.
    meant = {(*problem.path[:-1], _close(problem.path)) for problem in found}
    if not meant & {("zero_optimization",), ("zero_optimization", "stage")}:
        known = {problem.path for problem in found}
        found += [problem for problem in _combinations(strategy, dtype) if problem.path not in known]
    return found


def _unknown_keys(node: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[Problem]:
    for key, value in node.items():
        here = (*path, key)
        if not path and key in OWNED:
            yield Problem((key,), f"belongs to {OWNED[key]}; remove it from the DeepSpeed settings")
        elif reason := REFUSED.get(".".join(here)):
            yield Problem(here, f"refused: {reason}")
        elif key not in names_in(".".join(path)):
            close = _close(here)
            yield Problem(here, "not a DeepSpeed key that dspref knows" + (f"; did you mean '{close}'?" if close else ""))
        elif isinstance(value, Mapping) and ".".join(here) in SECTIONS:
            yield from _unknown_keys(value, here)


def _close(path: tuple[str, ...]) -> str | None:
    """The key that the last one of a path is a misspelling of."""
    known = names_in(".".join(path[:-1]))
    return next(iter(difflib.get_close_matches(path[-1], known, n=1, cutoff=0.8)), None) if path[-1] not in known else None


def _misread_values(node: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[Problem]:
    for key, value in node.items():
        if (not path and key in OWNED) or ".".join((*path, key)) in REFUSED:
            continue  # to be removed as a whole
        if value == "auto":
            yield Problem((*path, key), "DeepSpeed has no 'auto' of its own; give a value or remove the key")
        elif isinstance(value, str) and (value.startswith("~") or "$" in value):
            yield Problem((*path, key), f"DeepSpeed expands neither ~ nor variables; write the whole path, not {value!r}")
        elif isinstance(value, Mapping):
            yield from _misread_values(value, (*path, key))


def _combinations(strategy: Mapping[str, Any], dtype: str) -> Iterator[Problem]:
    wrong = list(_wrong_values(strategy))
    yield from wrong
    zero = strategy.get(ZERO, {})
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else None
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        return
    told, given = {problem.path for problem in wrong}, set(asked(strategy))
    if stage == 0 and dtype != "float32":
        told.add((ZERO, "stage"))
        yield Problem(
            (ZERO, "stage"),
            f"stage 0 in {dtype} starts with an empty optimizer step (wrong AdamW bias correction); use 1",
        )
    for key in KEYS:
        path, other = tuple(key.path.split(".")), tuple(key.needs[0].split(".")) if key.needs else ()
        if key.path not in given or key.path in idle(strategy) or {path, other} & told:
            continue
        if reason := _unread(key, strategy, int(stage), dtype):
            told.add(path)
            yield Problem(path, reason)
    yield from (problem for problem in [*_of_experts(strategy), *_of_unproven(strategy)] if problem.path not in told)


def _of_experts(strategy: Mapping[str, Any]) -> Iterator[Problem]:
    if not spreads_experts(strategy):
        return
    if not _is_given(strategy, f"{EXPERTS}.autoep_size"):
        yield Problem((EXPERTS,), "enabled does not say how many ranks share the experts; set autoep_size beside it")
    for path in asked(strategy):
        if path not in BESIDE_EXPERTS:
            yield Problem(tuple(path.split(".")), "has not been tried with expert_parallel; remove one of them")


def _wrong_values(strategy: Mapping[str, Any]) -> Iterator[Problem]:
    for section in SECTIONS:
        node = _node(strategy, section)
        if not isinstance(node, Mapping) and not (node is None and "." in section):
            said = f", not {node!r}" if "." in section else ""
            yield Problem(tuple(section.split(".")), f"must be a mapping{said}")
    for key in KEYS:
        if _is_given(strategy, key.path) and not _fits(key, value := _given(strategy, key.path)):
            refusal = f"refused: {ON_DISK[key.path]}" if key.path in ON_DISK and value == "nvme" else None
            yield Problem(tuple(key.path.split(".")), refusal or f"must be {_wanted(key)}, not {value!r}")


def _unread(key: Key, strategy: Mapping[str, Any], stage: int, dtype: str) -> str | None:
    """Why DeepSpeed would not look at a key that is asked for, or would go wrong by it."""
    offloaded = offloads_optimizer(strategy)
    own_bf16 = stage == 1 and dtype == "bfloat16" and not offloaded
    value = _given(strategy, key.path)
    if key.path == f"{ZERO}.overlap_comm" and stage in (0, 1):
        cannot = "DeepSpeed cannot overlap at stage 1 with one step per global batch; use stage 2"
        return None if not value else cannot if stage == 1 else _of_stage(key, stage)
    if str(stage) not in key.stages:
        return _of_stage(key, stage)
    if own_bf16 and key.path in UNREAD_IN_BF16:
        return "has no effect at stage 1 in bfloat16, for which DeepSpeed has an optimizer of its own; use 2, or remove it"
    if key.path == f"{ZERO}.contiguous_gradients" and offloaded and stage in (1, 2):
        return "false has no effect with offload_optimizer at stages 1 and 2; remove it"
    if key.path == f"{ZERO}.zero_hpz_partition_size" and (offloaded or device_of(strategy, "offload_param") != "none"):
        return "takes memory for speed, and offloading the contrary; runs have lost their loss with both; remove one of them"
    if key.path == "gradient_predivide_factor" and _given(strategy, "prescale_gradients"):
        return "has no effect with prescale_gradients; remove one of them"
    if key.needs == WHOLE_REDUCTION and (own_bf16 or stage == 0):
        return None
    return None if key.needs is None or _is_met(key.needs, strategy) else _missing(*key.needs)


def _of_stage(key: Key, stage: int) -> str:
    if key.path == "gradient_predivide_factor":
        return "at stage 3 DeepSpeed divides gradients once too often where it equals the number of ranks; remove it"
    *others, last = key.stages
    stages = f"{', '.join(others)} or {last}" if others else last
    which = "below 1 needs" if key.path.endswith(".ratio") else "needs"
    return f"{which} stage {stages}, not {stage}, where DeepSpeed ignores it; remove it, or change the stage"


def _is_met(needs: tuple[str, Any], strategy: Mapping[str, Any]) -> bool:
    other, wanted = needs
    return _value(strategy, other) in (wanted.split() if isinstance(wanted, str) else [wanted])


def _missing(other: str, wanted: Any) -> str:
    name = other.removeprefix(f"{ZERO}.")
    value = str(wanted).lower() if isinstance(wanted, bool) else " or ".join(wanted.split())
    return f"has no effect without {name}: {value}; set that, or remove it"


def _of_unproven(strategy: Mapping[str, Any]) -> Iterator[Problem]:
    """What no test of dspref could train with has to be asked for twice."""
    allowed, keys = strategy.get(UNPROVEN), unproven(strategy)
    if UNPROVEN in strategy and not isinstance(allowed, bool):
        yield Problem((UNPROVEN,), f"must be true or false, not {allowed!r}")
    elif allowed and not keys:
        yield Problem((UNPROVEN,), "there is no unproven key beside it; remove it")
    for path in [] if allowed else keys:
        yield Problem(
            tuple(path.split(".")),
            "runs on GPUs only, and no test of dspref trains with it; remove it, or go ahead by deepspeed.unproven: true",
        )


def unproven(strategy: Mapping[str, Any]) -> list[str]:
    """The keys that are asked for and that no test trains with, dotted."""
    return [path for path in asked(strategy) if not BY_PATH[path].test]


def idle(strategy: Mapping[str, Any]) -> list[str]:
    """The keys that are asked for and say in their names that they are for stage 3, at another stage. They are told and not
    refused, so that who tries another stage need change no other key."""
    return [path for path in asked(strategy) if path.startswith(f"{ZERO}.stage3_") and stage_of(strategy) != 3]


def asked(strategy: Mapping[str, Any]) -> list[str]:
    """The keys, dotted, whose values are not those that DeepSpeed would take anyway."""
    return [key.path for key in KEYS if _is_given(strategy, key.path) and not _is_default(key, _given(strategy, key.path))]


def _is_default(key: Key, value: Any) -> bool:
    return value is None or value == key.default


def _node(strategy: Mapping[str, Any], path: str) -> Any:
    """What stands at a dotted path; an empty mapping where nothing does."""
    node: Any = strategy
    for name in path.split("."):
        node = node.get(name, {}) if isinstance(node, Mapping) else {}
    return node


def _is_given(strategy: Mapping[str, Any], path: str) -> bool:
    section, _, name = path.rpartition(".")
    node = _node(strategy, section) if section else strategy
    return isinstance(node, Mapping) and name in node


def _given(strategy: Mapping[str, Any], path: str) -> Any:
    return _node(strategy, path) if _is_given(strategy, path) else None


def _value(strategy: Mapping[str, Any], path: str) -> Any:
    return _given(strategy, path) if _is_given(strategy, path) else BY_PATH[path].default


def _fits(key: Key, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if key.takes == "a path":
        return value is None or (isinstance(value, str) and value != "")
    if key.path == f"{ZERO}.stage":
        return number and value in (0, 1, 2, 3)
    if key.takes.startswith(("none", "fp16")):
        return value is None if key.default is None and value is None else value in key.takes.replace(",", "").split()
    if isinstance(key.default, bool) or key.takes == "true or false":
        return isinstance(value, bool) or (value is None and key.default is None)
    whole = isinstance(key.default, float) or isinstance(value, int) or (number and value.is_integer())
    return number and whole and key.least <= value <= max(key.most, float(key.default))


def _wanted(key: Key) -> str:
    if key.path == f"{ZERO}.stage":
        return "0, 1, 2 or 3"
    if key.takes:
        return key.takes
    if isinstance(key.default, bool):
        return "true or false"
    return f"a number from {key.least:g} to {key.most:g}" if key.most == 1 else f"a whole number, {key.least:g} or more"


def _device(zero: Mapping[str, Any], offload: str) -> str:
    section = zero.get(offload)
    return section.get("device", "none") if isinstance(section, Mapping) else "none"


def spreads_experts(strategy: Mapping[str, Any]) -> bool:
    """Whether ranks are to hold the experts of a layer between them."""
    return bool(_value(strategy, f"{EXPERTS}.enabled"))


def stage_of(strategy: Mapping[str, Any]) -> int:
    """Of ZeRO."""
    return strategy.get("zero_optimization", {}).get("stage", 0)


def device_of(strategy: Mapping[str, Any], offload: str) -> str:
    """none or cpu: where `offload` (offload_param, offload_optimizer) puts things."""
    return _device(strategy.get("zero_optimization", {}), offload)


def offloads_optimizer(strategy: Mapping[str, Any]) -> bool:
    return device_of(strategy, "offload_optimizer") != "none"
