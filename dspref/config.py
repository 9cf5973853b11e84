"""One YAML file -> one frozen `Config`. Loads no torch, so that `dspref check` answers at once on a login node.

Order: defaults < file < `section.key=value` on the command line. An unknown key, a wrong type or an option that does not
apply is an error in one line that names file, line and column.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dspref import objectives, secrets
from dspref.checks import BESIDE_PATH, CHECKS
from dspref.errors import ConfigError
from dspref.explain import explain, locate
from dspref.sections import (
    DEFAULT_OBJECTIVE,
    OBJECTIVE_SECTIONS,
    CheckpointSection,
    Columns,
    Config,
    LoraSection,
    ModelSection,
    SourceSection,
    Template,
    shipped,
)
from dspref.yaml12 import apply_override, parse

__all__ = [
    "CheckpointSection", "Config", "LoraSection", "ModelSection", "SourceSection",
    "cache_folder", "dump", "load", "resolved", "schema", "shipped",
]  # fmt: skip


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, and check everything.

    Raises ConfigError: `file:line:col: key: reason; did you mean ...?`
    """
    path = shipped(str(path))
    if kind := secrets.kind_of(str(path)):
        raise ConfigError(f"--config: {path}: holds {kind}; rename the file or its folder")
    document, positions = parse(path)
    for override in overrides:
        apply_override(document, positions, override)
    try:
        config = Config.model_validate(document)
    except ValidationError as error:
        raise ConfigError(explain(error, document, positions, lambda path: _fields_at(path, document))) from None
    for check in CHECKS:
        for blamed, reason in check(config):
            raise ConfigError(f"{locate(positions, blamed)}: {'.'.join(map(str, blamed))}: {reason}")
    return config


def dump(config: Config) -> str:
    """The resolved config as YAML; itself a valid config file."""
    import yaml

    return yaml.safe_dump(resolved(config), sort_keys=False, allow_unicode=True, width=120)


def resolved(config: Config) -> dict[str, Any]:
    """Every key that applies, with its value, and the strategy in place of its path."""
    values = config.model_dump(mode="json") | {"deepspeed": config.strategy}
    values["objective"] = objectives.resolved(**values["objective"])
    if config.model.lora and config.model.lora.path:
        values["model"]["lora"] = {key: value for key, value in values["model"]["lora"].items() if key in BESIDE_PATH}
    if config.train.warmup_steps is not None or config.train.lr_scheduler_type == "constant":
        del values["train"]["warmup_ratio"]  # which these exclude
    return values


def schema() -> str:
    """JSON Schema (draft 2020-12) of the YAML file, for editors."""
    return json.dumps(Config.model_json_schema() | {"title": "dspref run"}, indent=2) + "\n"


def cache_folder(kind: str) -> Path:
    """Where runs keep what they share: a folder of $DSPREF_CACHE, or of dspref/ in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dspref"
    return Path(os.environ.get("DSPREF_CACHE", default)) / kind


def _fields_at(path: tuple, document: Any) -> list[str]:
    """Names of the keys that the section at `path` of a document knows."""
    match path:
        case ():
            section = Config
        case ("objective",):
            section = OBJECTIVE_SECTIONS[document["objective"].get("name", DEFAULT_OBJECTIVE)]
        case ("model", "lora"):
            section = LoraSection
        case ("data", _, *_, "columns"):
            section = Columns
        case ("data", _, *_, "template"):
            section = Template
        case ("data", _, *_):
            section = SourceSection
        case _:
            section = Config.model_fields[path[0]].annotation
    return list(section.model_fields)  # type: ignore[union-attr]
