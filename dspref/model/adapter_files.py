"""Saved LoRA adapters, as peft writes them: where they lie, what they say of themselves, and what of it is refused."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from dspref import hub, reading
from dspref.config import LoraSection
from dspref.errors import ConfigError
from dspref.model import weights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What an adapter's config says beside how the adapter acts.
INCIDENTAL = ("base_model_name_or_path", "inference_mode", "revision", "lora_dropout", "peft_version", "task_type")

# Of a saved adapter's config, what may differ from peft's defaults. The rest changes the model below the adapter, so that it
# would not be the reference when the adapter is off (a trained bias, PiSSA), or has not been tried here.
UNDERSTOOD = {
    *LoraSection.model_fields, *INCIDENTAL, "auto_mapping", "fan_in_fan_out", "layers_pattern", "target_parameters",
}  # fmt: skip
# Types of what LoraSection does not know.
NONE = type(None)
KINDS: dict[str, tuple[type, ...]] = {
    "base_model_name_or_path": (str, NONE), "revision": (str, NONE), "inference_mode": (bool, NONE),
    "fan_in_fan_out": (bool, NONE), "layers_pattern": (str, list, NONE), "target_parameters": (list, NONE),
    "auto_mapping": (dict, NONE), "task_type": (str, NONE),
}  # fmt: skip


class Saved(NamedTuple):
    """An adapter on disk or on the hub: a folder, and the adapter's name where the folder holds several."""

    path: str
    name: str


def is_saved(path: str, name: str) -> bool:
    """Whether a folder holds an adapter."""
    return any((folder / CONFIG).is_file() for folder in (Path(path) / name, Path(path)))


def folder_of(source: Saved) -> Path:
    """The folder with the adapter's own files, downloaded first where `path` is a hub id. Raises ConfigError where there is
    none, or not one that is understood here.

    peft saves `default` at the root and adapters of other names in folders of their own.
    """
    root = Path(source.path)
    if not os.path.isdir(root):
        if reason := weights.no_folder(source.path):
            raise ConfigError(f"{source.path}: {reason}")
        root = hub.snapshot(source.path, None, (f"**{CONFIG}", f"**{WEIGHTS}"))
    named = [path.parent.name for path in sorted(root.glob(f"*/{CONFIG}"))]
    # An adapter that lies alone may be called anything; of several, only `default` is the one at the root.
    folder = root / source.name if source.name in named else root
    if (folder == root and named and source.name != "default") or not all((folder / f).is_file() for f in (CONFIG, WEIGHTS)):
        there = f"; it has {', '.join(named)}" if named else ""
        raise ConfigError(f"{source.path}: holds no adapter {source.name!r} ({CONFIG} beside {WEIGHTS}){there}")
    weights.refuse_other_kinds(folder, source.path)
    weights.refuse_outside(folder / WEIGHTS, folder, source.path)
    weights.tensors_of([folder / WEIGHTS], source.path)
    _refuse_kind(folder)
    return folder


def settings_of(folder: Path) -> dict[str, Any]:
    """What a saved adapter's config says. Raises ConfigError where it is broken."""
    path = folder / CONFIG
    try:
        settings = reading.read_json(path, strict=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {reading.words(error)}; save the adapter again") from None
    if not isinstance(settings, dict) or "peft_type" not in settings:
        raise ConfigError(f"{path}: describes no adapter (it has no peft_type); save the adapter again")
    for key, kinds in KINDS.items():
        if not isinstance(settings.get(key), kinds):
            raise ConfigError(f"{path}: {key}: {_short(settings[key])} is of a wrong type; save the adapter again")
    return settings


def _short(value: Any) -> str:
    return repr(value)[:80]


def _word(value: Any) -> str:
    return " ".join(str(value).split())[:80]


def _refuse_kind(folder: Path) -> None:
    """Raise ConfigError for an adapter that is not LoRA as it is understood here."""
    from peft import LoraConfig

    settings = settings_of(folder)
    if settings["peft_type"] != "LORA":
        raise ConfigError(f"{folder}: is {_word(settings['peft_type'])}, and only LoRA is trained here")
    plain = LoraConfig().to_dict()
    odd = {key: value for key, value in settings.items() if key not in UNDERSTOOD and value and value != plain.get(key)}
    if settings.get("init_lora_weights", True) not in (True, False, "gaussian"):
        odd["init_lora_weights"] = settings["init_lora_weights"]
    for key, value in odd.items():
        remedy = "merge that adapter into its model first"
        raise ConfigError(f"{folder / CONFIG}: {_word(key)}: {_short(value)} is not supported; {remedy}")
    given = {key: settings[key] for key in LoraSection.model_fields if settings.get(key) is not None}
    if isinstance(given.get("layers_to_transform"), int):
        given["layers_to_transform"] = [given["layers_to_transform"]]
    try:
        LoraSection.model_validate(given)
    except ValueError as error:  # pydantic's
        problem = error.errors()[0]  # type: ignore[attr-defined]
        reason = problem["msg"].replace("Input should", "must")
        where = f"{folder / CONFIG}: {problem['loc'][0]}"
        raise ConfigError(f"{where}: {reason}, not {_short(problem['input'])}; save the adapter again") from None


def digest(source: Saved) -> str:
    """sha256 over the bytes of the adapter's weights and what its config says of how it acts."""
    folder = folder_of(source)
    acts = {key: value for key, value in settings_of(folder).items() if key not in INCIDENTAL}
    found = hashlib.sha256(json.dumps(acts, sort_keys=True).encode())
    found.update((folder / WEIGHTS).read_bytes())
    return found.hexdigest()


def base_of(folder: str) -> tuple[str, str | None]:
    """(folder or hub id, revision) of the model that a saved adapter is for."""
    settings = settings_of(Path(folder))
    if not settings.get("base_model_name_or_path"):
        raise ConfigError(f"{Path(folder) / CONFIG}: base_model_name_or_path: names no model; write the one it is for")
    return settings["base_model_name_or_path"], settings.get("revision")
