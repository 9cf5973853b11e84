"""A config of another trainer -> a dspref YAML, with a comment for every value that has no place here or changes meaning.

Keys go where `foreign` says, values become what `foreign_values` says, and `absent` has the reasons of the rest; what more
there is to know of single keys is in `convert_keys`, `convert_data` and `convert_objective`. What the result's own checks
refuse is taken out and told, so that `dspref check` takes it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dspref.config import hints
from dspref.config.absent import NOT_NEEDED
from dspref.config.explain import Kind
from dspref.config.foreign import FOREIGN_KEYS, place_of
from dspref.config.load import examine
from dspref.config.sections import section_at
from dspref.config.yaml12 import parse_value
from dspref.convert import files
from dspref.convert.data import data
from dspref.convert.dialects import DEFAULTS, DIALECTS, OF_OBJECTIVE, objective_of, recognise, refuse_other_runs
from dspref.convert.draft import Draft, as_list, is_empty, quoted
from dspref.convert.keys import CHAPTERS
from dspref.convert.left_open import fill_in, leave_open, open_paths
from dspref.convert.theirs import Theirs
from dspref.convert.written import as_text, short
from dspref.errors import ConfigError

OBJECTIVES = ("dpo", "cpo", "simpo", "orpo", "kto", "bco", "tpo")
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
# Keys whose values are counted or computed with here, so that a number in quotes must be one.
COUNTED = re.compile(
    r"(batch_size|_steps|epochs?|ratio|rate|_norm|_r|rank|alpha|beta|gamma|weight|coef|limit|patience|samples|stage|_bit|_len"
    r"|length|dropout|seed|timeout|^lr|decay|epsilon|smoothing|_num)\Z"
)
WHOLE = re.compile(r"(batch_size|_steps|rank|_r|limit|patience|_bit|_num|samples)\Z")


def convert(
    path: Path, dialect: str | None = None, gpus: int | None = None, objective: str | None = None, python: bool = False
) -> str:
    """The YAML text for a file. Raises ConfigError for what cannot be read, and for what is no preference run."""
    theirs = files.read(path, python)
    return convert_keys(theirs, str(path), dialect, gpus, objective)


def convert_keys(
    theirs: Theirs, where: str, dialect: str | None = None, gpus: int | None = None, objective: str | None = None
) -> str:
    """The same of what was read. `where`: its name, for the first line and for errors."""
    if dialect and dialect not in DIALECTS:
        raise ConfigError(f"--from: must be one of {', '.join(DIALECTS)}, not {dialect!r}")
    if objective and objective not in OBJECTIVES:
        raise ConfigError(f"--objective: must be one of {', '.join(OBJECTIVES)}, not {objective!r}")
    method = objective or (theirs.method if theirs.method in OBJECTIVES else None)
    keys = {str(key): _number(str(key), value) for key, value in theirs.keys.items()}
    if not objective and {*keys} & {"model", "data", "output_dir"} == {"model", "data", "output_dir"}:
        raise ConfigError(f"{where}: is a dspref config already; `dspref check` says what is wrong with it")
    refuse_other_runs(keys | {"_file": Path(where).name}, where, method)
    dialect = dialect or recognise(keys) or ("trl" if method else None)
    if dialect is None:
        raise ConfigError(f"{where}: no key tells whose config it is; give --from {' | '.join(DIALECTS)}")
    number = gpus or theirs.gpus
    named = method or objective_of(keys | {"_file": Path(where).name}, dialect)
    if named == "dpo" and not objective and keys.get("loss_type") == "kto_pair":
        named = "kto"
    known = DEFAULTS[dialect] | OF_OBJECTIVE.get((dialect, named), {}) | theirs.defaults
    draft = Draft(keys, dialect, named, number or 8, known)
    draft.unread, draft.remarks, draft.lines, draft.names = theirs.unread, theirs.remarks, theirs.lines, dict(theirs.names)
    draft.file = Path(where).name
    data(draft)
    for chapter in CHAPTERS:
        chapter(draft)
    for key, value in draft.rest():
        place(draft, key, value)
    _repair(draft)
    fill_in(draft)
    _repair(draft)
    said = f"{number} GPUs" if number else "8 GPUs, which is assumed: give --gpus"
    document = _in_order({key: value for key, value in draft.document.items() if not is_empty(value)}, ())
    header = [
        f"Converted from {where} ({dialect}) by `dspref convert`, for {said}.",
        "Every value that differs from there, or has no place here, is told in a comment.",
        *_to_fill_in(document),
        "",
    ]
    return as_text(document, draft.notes, header, _footer(draft))


def _number(key: str, value: Any) -> Any:
    """A value with numbers and truth values out of their quotes, where no text is meant."""
    value = quoted(value) if COUNTED.search(key) or str(value).lower() in ("true", "false") else value
    whole = isinstance(value, float) and WHOLE.search(key) and 1 < value < 2**53 and value.is_integer()
    return int(value) if whole else value


def to_fill_in(text: str) -> int:
    """How many values of a conversion's result are still to be filled in."""
    return sum(not line.lstrip().startswith("#") for line in text.splitlines() if hints.FILL_IN in line)


def _to_fill_in(document: Mapping[str, Any]) -> list[str]:
    paths = list(open_paths(document))
    said = f"{len(paths)} values are" if len(paths) > 1 else "1 value is"
    return [f"{said} still to be filled in, where FILL_IN stands: {', '.join(paths)}."] if paths else []


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
            others = [draft.name(one) for one in draft.sources(path) if one != key and draft.get(path) is not None]
            draft.leave(key, value, f"{path} is set already" + (f", by {others[0]}" if others else ""))
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
        complaints = [complaint for complaint in examine(document)[1] if hints.STILL_OPEN not in complaint.reason]
        if not complaints:
            return
        moved = False
        for complaint in complaints:
            if complaint.kind is Kind.MISSING and complaint.path in MISSING:
                path, value = MISSING[complaint.path]
                draft.put(path, copy.deepcopy(value), "theirs does not say" + "; fill it in" * (path != "output_dir"))
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
            if isinstance(value, str) and (meant := as_list(quoted(value))) != value:  # a number or a list in quotes
                node[str(last)] = meant
                return True
            said = draft.notes.pop(tuple(path[:depth]), [])
            key = ".".join(map(str, path[:depth]))
            for inner in open_paths({key: value}):
                leave_open(draft, inner, reason)
            if value != hints.FILL_IN:
                _leave_refused(draft, key, value, reason, said)
            return True
    return False


def _leave_refused(draft: Draft, path: str, value: Any, reason: str, notes: Sequence[str]) -> None:
    """Tell what was refused by the key that theirs has for it, and by ours behind it."""
    sources = [key for key in draft.sources(path) if not key.startswith(("dataset", "eval_dataset"))]
    sources.sort(key=lambda key: draft.given[key] != value)
    if sources and path not in draft.given:
        key = sources[0]
        kept = [note for note in notes if note != f"{draft.name(key)}: {short(draft.given[key])}"]
        draft.leave(key, draft.given[key], "; ".join([f"{path}: {reason}", *kept]))
    else:
        draft.leave(path, value, "; ".join([reason, *notes]))


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
    lines = ["Not taken over:", *(text for _, text in sorted(draft.left))] if draft.left else []
    if draft.assumed:
        said = ", ".join(f"{key} {short(value)}" for key, value in draft.assumed.items())
        lines.append(f"Their defaults, which the file does not give: {said}")
    if draft.empty:
        lines.append(f"Empty there: {', '.join(sorted(map(draft.name, draft.empty)))}")
    return lines
