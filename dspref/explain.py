"""What pydantic found wrong with a config, in one line that a person can act on: place, key, reason, suggestion."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from dspref.objectives import OBJECTIVES, Family, defaults
from dspref.yaml12 import Position

# Keys of TRL and the Hugging Face Trainer that people will type, with what to write here.
FOREIGN_KEYS = {
    "per_device_train_batch_size": "train.pairs_per_step (the global batch) and data.tokens_per_pack (memory)",
    "per_device_eval_batch_size": "data.tokens_per_pack",
    "gradient_accumulation_steps": "train.pairs_per_step; micro-steps follow from data.tokens_per_pack",
    "bf16": "model.dtype: bfloat16",
    "fp16": "model.dtype: float16",
    "torch_dtype": "model.dtype",
    "model_name_or_path": "model.name_or_path",
    "ref_model": "reference.name_or_path",
    "precompute_ref_log_probs": "reference.mode: stored",
    "router_aux_loss_coef": "model.router_aux_loss_coef",
    "dataset_name": "data.train: {path: ...}",
    "dataset": "data.train: {path: ...}",
    "datasets": "data.train: a list of sources",
    "padding_free": "nothing: every batch is packed",
    "packing": "nothing: every batch is packed",
    "loss_type": "objective.loss_type",
    "learning_rate": "train.learning_rate",
    "num_train_epochs": "train.num_train_epochs",
    "max_steps": "train.max_steps",
    "warmup_ratio": "train.warmup_ratio",
    "warmup_steps": "train.warmup_steps",
    "lr_scheduler_type": "train.lr_scheduler_type",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "gradient_clipping": "train.max_grad_norm",
    "optim": "train.optim",
    "seed": "train.seed",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "max_length": "data.max_length",
    "max_prompt_length": "data.max_prompt_length",
    "max_completion_length": "data.max_completion_length",
    "save_steps": "checkpoint.save_every",
    "save_strategy": "checkpoint.save_every",
    "save_total_limit": "checkpoint.keep_last",
    "resume_from_checkpoint": "checkpoint.resume",
    "eval_steps": "train.eval_every",
    "eval_strategy": "train.eval_every",
    "evaluation_strategy": "train.eval_every",
    "logging_steps": "log.every",
    "report_to": "log.trackers",
    "run_name": "log.run_name",
    "use_peft": "model.lora",
    "peft_config": "model.lora",
    "lora_r": "model.lora.r",
    "lora_alpha": "model.lora.lora_alpha",
    "lora_dropout": "model.lora.lora_dropout",
    "lora_target_modules": "model.lora.target_modules",
    "lora_modules_to_save": "model.lora.modules_to_save",
    "use_rslora": "model.lora.use_rslora",
    "use_dora": "model.lora.use_dora",
    "load_in_4bit": "model.load_in_4bit",
    "model_adapter_name": "model.adapter_name",
    "ref_adapter_name": "reference.adapter_name",
    "sync_ref_model": "reference.sync_ref_model",
    "ref_model_mixup_alpha": "reference.ref_model_mixup_alpha",
    "ref_model_sync_steps": "reference.ref_model_sync_steps",
    "trust_remote_code": "model.trust_remote_code",
    "attn_implementation": "model.attn_implementation",
    "deepspeed_config": "deepspeed",
    "disable_dropout": "model.disable_dropout",
}


def explain(
    error: ValidationError,
    document: Any,
    positions: Mapping[tuple, Position],
    fields_at: Callable[[tuple], Sequence[str]],
) -> str:
    """The most telling problem, as `file:line:col: key: reason`. `fields_at` names the keys that a section knows."""
    problems: list[Any] = error.errors()
    # A key that is not known says more than the key that is missing for it.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    path = _written(problem["loc"], document)
    alternatives = [p for p in problems if _written(p["loc"], document) == path]  # the members of a union
    key = path[-1] if path else ""
    match problem["type"]:
        case _ if len(alternatives) > 1:
            expected = [p["msg"].removeprefix("Input should be ") for p in alternatives]
            reason = f"must be {' or '.join(expected)}, not {written(problem['input'])}"
        case "extra_forbidden":
            reason = "unknown key" + _suggest(str(key), fields_at(path[:-1]), path[:-1])
        case "missing":
            return f"{locate(positions, path[:-1])}: {'.'.join(map(str, path))}: is missing"
        case "union_tag_invalid" | "union_tag_not_found":
            if isinstance(problem["input"], Mapping):
                name = problem["input"].get("name")
                path, reason = (*path, "name"), f"must be one of {', '.join(OBJECTIVES)}, not {written(name)}"
                reason += _did_you_mean(str(name).lower(), list(OBJECTIVES))
            else:
                reason = f"must be a mapping, such as {{name: dpo}}, not {written(problem['input'])}"
        case "too_short":
            reason = "is an empty list"
        case "literal_error":
            reason = f"must be {problem['ctx']['expected']}, not {written(problem['input'])}"
            if path[:2] == ("objective", "loss_type") and (instead := _refused_loss(document, problem["input"])):
                return f"{locate(positions, path)}: {'.'.join(map(str, path))}: {instead}"
            choices = [part.strip("'") for part in problem["ctx"]["expected"].replace(" or ", ", ").split(", ")]
            reason += _did_you_mean(str(problem["input"]), choices)
        case _:
            message = problem["msg"].removeprefix("Value error, ").replace("Input should", "must")
            reason = f"{message}, not {written(problem['input'])}"
    return f"{locate(positions, path)}: {'.'.join(map(str, path)) or 'config'}: {reason}"


def _refused_loss(document: Any, loss_type: Any) -> str | None:
    """What to write instead of a loss that other tools have."""
    family = OBJECTIVES.get(document["objective"].get("name", "dpo"))
    return family.refused.get(loss_type) if family and isinstance(loss_type, str) else None


def _written(loc: tuple[str | int, ...], document: Any) -> tuple:
    """The keys as the file has them: pydantic's location without the tags of its unions."""
    path: list[str | int] = []
    part: Any
    for i, part in enumerate(loc):
        inside = isinstance(document, Mapping) and part in document
        if inside or (isinstance(document, list) and isinstance(part, int)):
            path.append(part)
            document = document[part]
        elif isinstance(document, Mapping) and i == len(loc) - 1:  # a key that is missing
            path.append(part)
    return tuple(path)


def _suggest(key: str, siblings: Sequence[str], parent: tuple) -> str:
    owners = [name for name, family in OBJECTIVES.items() if key in family_keys(name, family)]
    if owners and parent == ("objective",):
        return f"; it belongs to objective {' or '.join(owners)}"
    close = _did_you_mean(key, siblings)
    foreign = FOREIGN_KEYS.get(key) or (f"objective.{key}" if owners else None)
    if foreign and (not close or not parent):
        return f"; in dspref this is {foreign}"
    return close or f"; known here: {', '.join(siblings)}"


def family_keys(name: str, family: Family) -> set[str]:
    return {*defaults(name, family.losses), *(["loss_weights"] if family.mixes else [])}


def _did_you_mean(word: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6) or [c for c in choices if word and c.startswith(word)]
    return f"; did you mean '{close[0]}'?" if close and len(choices) > 1 else ""


def written(value: Any) -> str:
    """A value as the YAML has it, a text in quotes."""
    return repr(value) if isinstance(value, str) else yaml_word(value)


def yaml_word(value: Any) -> str:
    """A value as the YAML has it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def locate(positions: Mapping[tuple, Position], path: tuple) -> str:
    """Where the key at `path` was written; a key that was not written is blamed on its section."""
    while path not in positions:
        path = path[:-1]
    return str(positions[path])
