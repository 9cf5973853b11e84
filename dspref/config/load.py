"""One YAML file -> one frozen `Config`. Loads no torch, so that `dspref check` answers at once on a login node.

Order: defaults < the files that it includes < the file < `section.key=value` on the command line. An unknown key, a wrong
type or an option that does not apply is an error in one line that names file, line and column; all errors are told at once.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dspref import objectives, own_code, secrets
from dspref.config import checks, include
from dspref.config.checks import BESIDE_PATH
from dspref.config.explain import Complaint, Kind, explain, line, written_path
from dspref.config.paths import expand, shipped
from dspref.config.sections import Config, in_full
from dspref.config.yaml12 import Position, apply_override
from dspref.errors import ConfigError

# Lines that are told of one config, and rounds of taking faults out of it.
MAX_LINES, MAX_REPAIRS = 40, 20
MANY_LINES = 10**9
# For keys that are missing, so that the rest can be looked at.
PLACEHOLDERS: dict[Any, Any] = {"model": {}, "data": {}, "train": {"path": "-"}}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, and check everything.

    Raises ConfigError with a line for each fault: `file:line:col: key: reason; did you mean ...?`
    """
    return read(path, overrides)[0]


def read(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, dict[tuple, Position]]:
    """The same, with the place of each key."""
    try:
        path = shipped(expand(str(path)))
    except ValueError as error:
        raise ConfigError(f"--config: {error}") from None
    if kind := secrets.kind_of(str(path)):
        raise ConfigError(f"--config: {path}: holds {kind}; rename the file or its folder")
    document, positions, _ = include.read(path, in_full)
    faults = []
    for override in overrides:
        try:
            apply_override(document, positions, override, in_full)
        except ConfigError as error:
            faults.append(str(error))
    with own_code.kept_in(path.parent):
        config, complaints = examine(document)
    # An override that could not be read may have been what is missing.
    complaints = [c for c in complaints if not (faults and c.kind is Kind.MISSING)]
    ordered = sorted(complaints, key=lambda c: (c.kind, position_of(positions, c.path)))
    faults = list(dict.fromkeys([*faults, *(line(complaint, positions) for complaint in ordered)]))
    if config is None or faults:
        more = [f"... and {len(faults) - MAX_LINES} more"] * (len(faults) > MAX_LINES)
        raise ConfigError("\n".join([*faults[:MAX_LINES], *more]))
    return config, positions


def source(path: str | Path) -> str:
    """The text of a config as it was written, with the files that it includes behind it, as comments. Raises ConfigError."""
    path = shipped(expand(str(path)))
    _, _, included = include.read(path, in_full)
    texts = [path.read_text(encoding="utf-8")]
    for file in dict.fromkeys(included):
        lines = ["", f"included: {file}", *file.read_text(encoding="utf-8").splitlines()]
        texts.append("".join(f"# {line}".rstrip() + "\n" for line in lines))
    return "".join(texts)


def examine(document: dict[str, Any]) -> tuple[Config | None, list[Complaint]]:
    """The config that a document holds, and everything that is wrong with it; None where no part can be read."""
    try:
        config = Config.model_validate(document)
    except ValidationError as error:
        complaints = explain(error, document)
        if (sound := without_faults(document)) is None:
            return None, complaints
        unsound = {path for c in complaints for path in (c.path, *c.meant)} | sound[1]
        found = [Complaint(*complaint) for complaint in checks.complaints(sound[0], document, unsound)]
        return None, complaints + [c for c in found if c.path not in unsound]
    return config, [Complaint(*complaint) for complaint in checks.complaints(config, document)]


def without_faults(document: dict[str, Any]) -> tuple[Config, set[tuple]] | None:
    """What is sound in a document, with defaults in place of the rest, and the keys that have them."""
    document, unsound = copy.deepcopy(document), set()
    for _ in range(MAX_REPAIRS):
        try:
            return Config.model_validate(document), unsound
        except ValidationError as error:
            for problem in error.errors(include_url=False):
                path = written_path(problem["loc"], document)
                if not path:
                    return None
                unsound.add(_without(document, path, problem["type"] == "missing"))
    return None


def _without(document: dict[str, Any], path: tuple, missing: bool) -> tuple:
    """Take the key at `path` out, or put one in where it is missing; the key that was changed."""
    depth = next((i for i, part in enumerate(path) if isinstance(part, int)), len(path) - 1)
    # An item of a list cannot go without moving the others, so it is emptied: to be filled, or to go with its list.
    node: Any = document
    for part in path[:-1]:
        node = node[part] if isinstance(node, dict | list) else {}
    if isinstance(node, dict):
        if missing:
            node[path[-1]] = PLACEHOLDERS.get(path[-1], "-")
        else:
            node.pop(path[-1], None)
        return path
    whole = path[: max(depth, 1)]
    return _without(document, whole, False)


def position_of(positions: Mapping[tuple, Position], path: tuple) -> tuple[int, int]:
    """To sort by: overrides come last, as they do on the command line."""
    while path not in positions:
        path = path[:-1]
    _, row, column = positions[path]
    return (row, column) if row or not path else (MANY_LINES, 0)


def repeated(overrides: Sequence[str]) -> list[str]:
    """Overrides that a later one replaces, each in a line that says so."""
    keys = [override.partition("=")[0] for override in overrides]
    return [
        f"override '{overrides[i]}': is replaced by '{overrides[j]}' behind it"
        for i, key in enumerate(keys)
        for j in [next((j for j in range(i + 1, len(keys)) if key == keys[j] or key.startswith(f"{keys[j]}.")), 0)]
        if j
    ]


def dump(config: Config) -> str:
    """The resolved config as YAML; itself a valid config file."""
    return as_yaml(resolved(config))


def as_yaml(settings: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=120)


def resolved(config: Config) -> dict[str, Any]:
    """Every key that applies, with its value, and the strategy in place of its path."""
    values = config.model_dump(mode="json") | {"deepspeed": config.strategy}
    values["objective"] = objectives.resolved(**values["objective"])
    if config.model.lora and config.model.lora.path:
        values["model"]["lora"] = {key: value for key, value in values["model"]["lora"].items() if key in BESIDE_PATH}
    if config.train.warmup_steps is not None or config.train.lr_scheduler_type == "constant":
        del values["train"]["warmup_ratio"]  # which these exclude
    return values


def given(config: Config) -> dict[str, Any]:
    """The keys that file and overrides set, with their values."""
    return config.model_dump(mode="json", exclude_unset=True)


def resolved_anew(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that were resolved before, with the keys that there are now.

    Raises ValueError for those of another version.
    """
    return resolved(Config.model_validate(settings))


def schema() -> str:
    """JSON Schema (draft 2020-12) of the YAML file, for editors."""
    return json.dumps(Config.model_json_schema() | {"title": "dspref run"}, indent=2) + "\n"


def cache_folder(kind: str) -> Path:
    """Where runs keep what they share: a folder of $DSPREF_CACHE, or of dspref/ in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dspref"
    return Path(os.environ.get("DSPREF_CACHE", default)).expanduser() / kind
