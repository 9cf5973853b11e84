"""A config of another trainer -> a dspref YAML, with a comment for every value that has no place here or changes meaning.

Keys go where `foreign` says, values become what `foreign_values` says, and `absent` has the reasons of the rest; what more
there is to know of single keys is in `convert_keys`, `convert_data` and `convert_objective`. What the result's own checks
refuse is taken out and told, so that `dspref check` takes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dspref.config import hints, their_files
from dspref.config.absent import NOT_NEEDED
from dspref.config.convert_data import data
from dspref.config.convert_keys import CHAPTERS
from dspref.config.dialects import DEFAULTS, DIALECTS, objective_of, recognise, refuse_other_runs
from dspref.config.draft import Draft, is_empty
from dspref.config.explain import Kind
from dspref.config.foreign import FOREIGN_KEYS, place_of
from dspref.config.load import examine
from dspref.config.sections import section_at
from dspref.config.their_files import Theirs
from dspref.config.written import as_text, short
from dspref.config.yaml12 import parse_value
from dspref.errors import ConfigError

OBJECTIVES = ("dpo", "cpo", "simpo", "orpo")
# Theirs count batches or layers, ours tokens; and what is decided for the whole config.
OF_OTHER_UNIT = {"data.tokens_per_pack", "reference.tokens_per_pack", "deepspeed", "data.scored", "data.on_overlong"}
# Theirs are flags, or count epochs.
UNLIKE = {
    "evals_per_epoch", "saves_per_epoch", "eval_on_start", "eval_delay", "generate_during_eval", "dpo_generate_during_eval",
    "generate_samples", "load_balancing_loss", "logging_dir", "export_dir", "sanity_check", "adam_betas", "merge_lora",
}  # fmt: skip
MISSING = {
    ("model",): ("model.name_or_path", "FILL_IN/model"),
    ("model", "name_or_path"): ("model.name_or_path", "FILL_IN/model"),
    ("data",): ("data.train", {"path": "FILL_IN/pairs"}),
    ("data", "train"): ("data.train", {"path": "FILL_IN/pairs"}),
    ("data", "train", "path"): ("data.train.path", "FILL_IN/pairs"),
    ("output_dir",): ("output_dir", "runs/converted"),
}
MOST_REPAIRS = 60
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def convert(
    path: Path, dialect: str | None = None, gpus: int | None = None, objective: str | None = None, python: bool = False
) -> str:
    """The YAML text for a file. Raises ConfigError for what cannot be read, and for what is no preference run."""
    theirs = their_files.read(path, python)
    return convert_keys(theirs, str(path), dialect, gpus, objective)


def convert_keys(
    theirs: Theirs, where: str, dialect: str | None = None, gpus: int | None = None, objective: str | None = None
) -> str:
    """The same of what was read. `where`: its name, for the first line and for errors."""
    if dialect and dialect not in DIALECTS:
        raise ConfigError(f"--from: must be one of {', '.join(DIALECTS)}, not {dialect!r}")
    if objective and objective not in OBJECTIVES:
        raise ConfigError(f"--objective: must be one of {', '.join(OBJECTIVES)}, not {objective!r}")
    method = objective or (theirs.method if theirs.method in (*OBJECTIVES, "kto") else None)
    if method == "kto":
        raise ConfigError(f"{where}: is a config of KTO, which needs no pairs; dspref trains on preference pairs")
    keys = {str(key): value for key, value in theirs.keys.items()}
    if not objective and {*keys} & {"model", "data", "output_dir"} == {"model", "data", "output_dir"}:
        raise ConfigError(f"{where}: is a dspref config already; `dspref check` says what is wrong with it")
    refuse_other_runs(keys | {"_file": Path(where).name}, where, method)
    dialect = dialect or recognise(keys) or ("trl" if method else None)
    if dialect is None:
        raise ConfigError(f"{where}: no key tells whose config it is; give --from {' | '.join(DIALECTS)}")
    number = gpus or theirs.gpus
    named = method if method in OBJECTIVES else objective_of(keys | {"_file": Path(where).name}, dialect)
    draft = Draft(keys, dialect, named, number or 8, dict(DEFAULTS[dialect]))
    for key, code in theirs.unread.items():
        draft.leave(key, code, "is computed there; write the value where it belongs")
    data(draft)
    for chapter in CHAPTERS:
        chapter(draft)
    for key, value in draft.rest():
        place(draft, key, value)
    _repair(draft)
    said = f"{number} GPUs" if number else "8 GPUs, which is assumed: give --gpus"
    header = [
        f"Converted from {where} ({dialect}) by `dspref convert`, for {said}.",
        "Every value that differs from there, or has no place here, is told in a comment.",
        "",
    ]
    document = _in_order({key: value for key, value in draft.document.items() if not is_empty(value)}, ())
    return as_text(document, draft.notes, header, _footer(draft))


def place(draft: Draft, key: str, value: Any) -> None:
    """A key that needs no knowledge beyond the tables."""
    if is_empty(value):
        draft.empty.append(key)
        return
    found = place_of(key)
    homes = [] if found or key in NOT_NEEDED else hints.homes_of(key)
    path, literal = (".".join(found[0]), found[1]) if found else (homes[0] if len(homes) == 1 else None, None)
    if (
        path
        and key not in UNLIKE
        and path not in OF_OTHER_UNIT
        and path.count(".") < 3
        and not path.startswith("data.train")
    ):
        if draft.get(path) is not None:
            draft.leave(key, value, f"{path} is set already")
        elif literal is None:
            draft.translate(path, key, value)
        elif value in (True, "true", "True", "auto"):
            draft.put(path, parse_value(literal), f"{key}: {short(value)}")
        elif value not in (False, "false", "False"):
            draft.leave(key, value, f"in dspref this is {FOREIGN_KEYS[key]}")
        return
    if key in FOREIGN_KEYS:
        if value is not False:
            draft.leave(key, value, f"in dspref this is {FOREIGN_KEYS[key]}")
    elif homes:
        draft.leave(key, value, f"in dspref this is {' or '.join(homes)}")
    else:
        draft.leave(key, value, NOT_NEEDED.get(key, "is no key that dspref knows"))


def _repair(draft: Draft) -> None:
    """Take out what the config's own checks refuse, and tell it; fill what it must have and theirs does not name."""
    for _ in range(MOST_REPAIRS):
        document = {key: value for key, value in draft.document.items() if value is not None}
        complaints = examine(document)[1]
        if not complaints:
            return
        moved = False
        for complaint in complaints:
            if complaint.kind is Kind.MISSING and complaint.path in MISSING:
                path, value = MISSING[complaint.path]
                draft.put(path, value, "theirs does not say; fill it in")
                moved = True
            else:
                moved |= _take_out(draft, complaint.path, complaint.reason)
        if not moved:
            return


def _take_out(draft: Draft, path: Sequence[str | int], reason: str) -> bool:
    """Remove the key at a path, or the nearest above it, from the document."""
    for depth in range(len(path), 0, -1):
        node: Any = draft.document
        for key in path[: depth - 1]:
            node = _inside(node, key)
        last = path[depth - 1]
        if isinstance(node, dict) and node.get(str(last)) is not None:
            value = node.pop(str(last))
            if isinstance(value, str) and NUMBER.fullmatch(value):  # in quotes there
                node[str(last)] = parse_value(value)
                return True
            said = draft.notes.pop(tuple(path[:depth]), [])
            draft.leave(".".join(map(str, path[:depth])), value, "; ".join([reason, *said]))
            return True
    return False


def _inside(node: Any, key: str | int) -> Any:
    if isinstance(node, list) and isinstance(key, int):
        return node[key] if key < len(node) else None
    return node.get(str(key)) if isinstance(node, Mapping) else None


def _in_order(node: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """The keys in the order of their sections."""
    section = section_at(path, {"objective": node} if path == ("objective",) else node)
    order = list(section.model_fields) if section else []
    keys = sorted(node, key=lambda key: order.index(key) if key in order else len(order))
    return {key: _in_order(node[key], (*path, key)) if isinstance(node[key], Mapping) else node[key] for key in keys}


def _footer(draft: Draft) -> list[str]:
    lines = ["Not taken over:", *sorted(draft.left)] if draft.left else []
    if draft.assumed:
        lines.append(f"Their defaults, which the file does not give: {', '.join(draft.assumed)}")
    if draft.empty:
        lines.append(f"Empty there: {', '.join(sorted(draft.empty))}")
    return lines
