"""What a config of another trainer says, as flat keys and values, and where it says it; groups of keys are opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dspref.errors import ConfigError

# Keys of peft's LoraConfig -> of TRL's command line.
OF_LORA = {
    "r": "lora_r", "target_modules": "lora_target_modules", "modules_to_save": "lora_modules_to_save",
    "task_type": "lora_task_type",
}  # fmt: skip
# Keywords of TRL's BEMACallback, which stand beside keys of other meaning.
OF_BEMA = {
    name: f"bema.{name}"
    for name in (
        *("update_freq", "ema_power", "bias_power", "lag", "update_after", "multiplier", "min_ema_multiplier"),
        *("device", "update_ref_model", "ref_model_update_freq", "ref_model_update_after"),
    )
}
# What peft takes where a LoraConfig says nothing; TRL's command line has its own.
OF_PEFT = {"lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0}
# By these a script has its settings from a command line.
PARSERS = {"HfArgumentParser", "TrlParser"}
# Mappings whose keys stand at the top of a file elsewhere.
GROUPS = {
    f"{name}{end}"
    for name in ("model", "data", "training", "script", "trainer", "finetuning", "dpo", "cpo", "orpo", "simpo", "sft")
    for end in ("_args", "_arguments", "_config")
} | {"training", "trainer", "arguments", "args", "hyperparameters", "dpo_trainer"}
ADAPTERS = {"peft_config", "lora_config", "lora_args", "peft_args", "peft"}
# Mappings whose keys have the mapping's name before them, with a point.
DOTTED = {"ckpt", "ds", "adam", "logger", "ref"}
MERGE = "<<"


@dataclass
class Theirs:
    """What a file says."""

    keys: dict[str, Any]
    method: str | None = None
    """dpo, cpo, ...: what a class or a command tells."""
    gpus: int | None = None
    unread: dict[str, str] = field(default_factory=dict)
    """Keys whose values are computed, and the code."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """What is taken where this file says nothing, in place of what their command line takes."""
    remarks: dict[str, str] = field(default_factory=dict)
    """What is to be told of the value of a key."""
    lines: dict[str, int] = field(default_factory=dict)
    """Where keys stand, those of mappings as `trl.beta`."""
    names: dict[str, str] = field(default_factory=dict)
    """How a key is written there, where that is not as it is here."""


def flat(document: Mapping[str, Any], lines: Mapping[str, int], where: str) -> Theirs:
    """A document with its groups opened. Raises ConfigError where two of them have the same key."""
    found = Theirs({}, lines=dict(lines), defaults=dict(OF_PEFT) if {*document} & ADAPTERS else {})
    for name, key, value in _opened(document, where):
        if key in found.keys:
            line = f":{lines[name]}" if name in lines else ""
            raise ConfigError(f"{where}{line}: {name}: is given as {found.names.get(key, key)} too; take one out")
        found.keys[key] = value
        if name != key:
            found.names[key] = name
            if name in lines:
                found.lines.setdefault(key, lines[name])
    return found


def _opened(document: Mapping[str, Any], where: str) -> Iterator[tuple[str, str, Any]]:
    """(what it is called there, key, value)"""
    for key, value in document.items():
        if key == MERGE:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}: <<: takes a mapping of keys; write its keys where they belong")
            yield from ((f"{MERGE}.{name}", name, inner) for name, inner in value.items() if name not in document)
        elif isinstance(value, Mapping) and (key in GROUPS or key in DOTTED):
            for name, inner in value.items():
                yield f"{key}.{name}", f"{key}.{name}" if key in DOTTED else str(name), inner
        elif isinstance(value, Mapping) and key in ADAPTERS and value:
            if "use_peft" not in document:
                yield str(key), "use_peft", True
            for name, inner in value.items():
                yield f"{key}.{name}", OF_LORA.get(str(name), str(name)), inner
        else:
            yield str(key), str(key), value
