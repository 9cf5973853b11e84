"""What pydantic found wrong with a config, a line for each key that a person can act on: place, key, reason, suggestion."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from pydantic import ValidationError

from dspref import own_code
from dspref.config import hints, numbers
from dspref.config.paths import VARIABLE
from dspref.config.sections import ProfileSection, SourceSection, section_at
from dspref.config.yaml12 import Position, YamlError, parse_value
from dspref.objectives import OBJECTIVES

LONGEST_VALUE = 80

Path = tuple[str | int, ...]


class Kind(IntEnum):
    """The order in which complaints are told: the most telling first."""

    UNKNOWN = 0
    VALUE = 1
    COMBINATION = 2
    MISSING = 3


class Complaint(NamedTuple):
    """What is wrong with the key at `path` of the document."""

    path: Path
    reason: str
    kind: Kind = Kind.COMBINATION
    meant: frozenset[Path] = frozenset()
    """The keys that an unknown one stands for."""


# What a value must be, by the type of pydantic's error.
EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "a text that is not empty",
    "list_type": "a list",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
    "finite_number": "a finite number",
}
# The same of a section that has a short form.
IN_SHORT = {
    SourceSection.__name__: "a path or a mapping of keys ({path: ...})",
    ProfileSection.__name__: "the first step and the last one, such as [5, 8], or a step",
}
# What to write for a key that is missing.
EXAMPLES: dict[Path, str] = {
    ("model",): "model: {name_or_path: FOLDER_OR_HUB_ID}",
    ("model", "name_or_path"): "a folder or a hub id",
    ("data",): "data: {train: {path: FILE}}",
    ("data", "train"): "train: {path: FILE}",
    ("output_dir",): "output_dir: runs/NAME",
}
# What was meant by a text in the place of a section.
WHOLE: dict[Path, str] = {("model",): "{{name_or_path: {}}}", ("data",): "{{train: {}}}"}
# A missing section is missing for the one key that it must have.
NEEDS: dict[Path, Path] = {("model",): ("model", "name_or_path"), ("data",): ("data", "train")}
TRUE, FALSE = ("yes", "on", "y", "t", "1", "true"), ("no", "off", "n", "f", "0", "false", "none")


def explain(error: ValidationError, document: Any) -> list[Complaint]:
    """One complaint for each key, without those that only follow from another."""
    of_keys: dict[Path, list[Any]] = {}
    for problem in error.errors(include_url=False):
        of_keys.setdefault(written_path(problem["loc"], document), []).append(problem)
    # Where one member of a union got as far as a key below, that key is what is wrong.
    deepest = [
        path for path in of_keys if not any(other[: len(path)] == path for other in of_keys if len(other) > len(path))
    ]
    found = [_complaint(path, of_keys[path], document) for path in deepest]
    meant = {path for complaint in found for path in complaint.meant}
    return [c for c in found if c.kind is not Kind.MISSING or not {c.path, NEEDS.get(c.path, c.path)} & meant]


def _complaint(path: Path, problems: Sequence[Any], document: Any) -> Complaint:
    problem = problems[0]
    value, kind = problem["input"], problem["type"]
    if kind == "extra_forbidden":
        hint, meant = hints.of_key(str(path[-1]), path[:-1], section_at(path[:-1], document))
        if path[:-1] == ("data", "eval") and not meant and isinstance(value, str):
            hint, meant = (
                f"a set with a name is written {path[-1]}: {{path: {_short(value)}}}",
                {("data", "eval", "path")},
            )
        return Complaint(path, "unknown key" + (hint and f"; {hint}"), Kind.UNKNOWN, frozenset(meant))
    if kind == "missing":
        return Complaint(path, "is missing" + _example(path), Kind.MISSING)
    if kind.startswith("union_tag"):
        return _no_objective(path, value)
    return Complaint(path, _value(path, value, problems, document), Kind.VALUE)


def _example(path: Path) -> str:
    if path in EXAMPLES:
        return f"; write {EXAMPLES[path]}"
    return "; give it a path: a file, glob, folder or hub id" if path[-1:] == ("path",) else ""


def _no_objective(path: Path, value: Any) -> Complaint:
    if not isinstance(value, Mapping):
        return Complaint(path, f"must be a mapping, not {written(value)}; write {hints.objective_of(value)}", Kind.VALUE)
    name = value.get("name")
    reason = f"must be one of {', '.join(OBJECTIVES)}, not {written(name)}{hints.of_objective(name)}"
    return Complaint((*path, "name"), reason, Kind.VALUE)


def _value(path: Path, value: Any, problems: Sequence[Any], document: Any) -> str:
    problem, key = problems[0], next((str(part) for part in reversed(path) if isinstance(part, str)), "")
    match problem["type"]:
        case "path":
            reason = problem["ctx"]["reason"]
            shell = f', or give it on the command line, where the shell expands it: {dotted(path)}="{_short(value)}"'
            reason += ", or drop the key" * bool(reason.startswith("is empty") and not _is_required(path, document))
            return _short(reason, 300) + shell * bool(VARIABLE.search(value) and "expanded" in reason)
        case "own_loss":
            return problem["ctx"]["reason"]
        case "too_short":
            return "is an empty list; give it an item" + ", or drop the key" * (not _is_required(path, document))
        case "string_pattern_mismatch":
            return f"must be letters, digits, _ and - only, not {written(value)}"
        case "literal_error" if path[:2] == ("objective", "loss_type") and (instead := _refused_loss(document, value)):
            return instead
    expected = list(dict.fromkeys(_expected(one) for one in problems))
    if len(expected) > 1:
        expected = ["true, false" if one == "true or false" else one for one in expected]
    must = " or ".join(filter(None, [", ".join(expected[:-1]), expected[-1]]))
    if value == hints.FILL_IN:
        return f"{hints.STILL_OPEN}, with {must}"
    choices = [choice for one in problems if one["type"] == "literal_error" for choice in _choices(one)]
    if value is None:
        return f"must be {must}, not null; give it a value" + ", or drop the key" * (not _is_required(path, document))
    elsewhere = _loss_elsewhere(document, value) if path[:2] == ("objective", "loss_type") and choices else ""
    hint = (
        elsewhere
        or hints.of_value(key, value, choices, key != path[-1])
        or _remedy(path, value, {one["type"] for one in problems})
    )
    return f"must be {must}, not {written(value)}{hint}"


def _expected(problem: Mapping[str, Any]) -> str:
    if of_section := IN_SHORT.get(problem.get("ctx", {}).get("class_name")):
        return of_section
    known = EXPECTED.get(problem["type"])
    return known or problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ").replace("valid ", "")


def _choices(problem: Mapping[str, Any]) -> list[str]:
    return [part.strip("'") for part in problem["ctx"]["expected"].replace(" or ", ", ").split(", ")]


def _is_required(path: Path, document: Any) -> bool:
    section = section_at(path[:-1], document)
    return bool(section and path[-1] in section.model_fields and section.model_fields[str(path[-1])].is_required())


def _remedy(path: Path, value: Any, kinds: set[str]) -> str:
    """How to write a value that is of the wrong type but means the right thing; nothing where that is not sure."""
    word = value.lower() if isinstance(value, str) else ""
    if path == ("model", "lora"):
        rank = isinstance(value, int) and value > 0
        return f"; write {{r: {value}}}" if rank else f"; write {yaml_word(word not in FALSE)}" if word else ""
    if path == ("parallel",) and isinstance(value, int) and value > 0:
        return f"; write {{sequence: {value}}}"
    if path in WHOLE and isinstance(value, str):
        return f"; write {WHOLE[path].format(_short(value))}"
    if path[:1] == ("data",) and path[-1:] == ("path",) and isinstance(value, list):
        return f"; of several files, each is a source: {dotted(path[:2])}: [{{path: ...}}, {{path: ...}}]"
    if "bool_type" in kinds and (word in TRUE or word in FALSE):
        return f"; write {yaml_word(word in TRUE)}"
    if {"int_type", "float_type"} & kinds and isinstance(value, str) and VARIABLE.search(value):
        return "; variables are not expanded; write the number"
    if {"int_type", "int_from_float"} & kinds and isinstance(number := _number(value, path), float | int):
        return f"; write {int(number)}" if float(number).is_integer() else ""
    if "float_type" in kinds and (number := _number(value, path)) is not None:
        return f"; write {number}"
    if kinds == {"string_type"} and isinstance(value, int | float) and not isinstance(value, bool):
        return f"; write '{value}', in quotes"
    if "list_type" in kinds and isinstance(value, str | int | float) and not isinstance(value, bool):
        return f"; write [{_short(value)}]"
    return ""


def _number(value: Any, path: Path) -> float | int | None:
    """The number that a value of another type stands for: '8', 8.0, '1_000', '16k'."""
    try:
        if isinstance(value, str) and (number := numbers.meant(value.strip(), str(path[-1]))) is not None:
            return number
        number = parse_value(value.strip().replace("_", "")) if isinstance(value, str) else value
        return number if isinstance(number, int | float) and not isinstance(number, bool) and abs(number) < 1e15 else None
    except YamlError:
        return None


def _refused_loss(document: Any, loss_type: Any) -> str | None:
    """What to write instead of a loss that other tools have."""
    family = OBJECTIVES.get(document["objective"].get("name", "dpo"))
    return family.refused.get(loss_type) if family and isinstance(loss_type, str) else None


def _loss_elsewhere(document: Any, loss_type: Any) -> str:
    """The same of one that another family has, behind a semicolon, or nothing."""
    family = document["objective"].get("name", "dpo")
    if family not in OBJECTIVES or not isinstance(loss_type, str):
        return ""
    instead = hints.of_loss(loss_type, family)
    meant = ":".join(loss_type.rsplit(".", 1))
    if not instead and OBJECTIVES[family].own_of and re.fullmatch(own_code.NAME, meant):
        instead = f"a loss of your own is written {meant}"
    return f"; {instead}" if instead else ""


def written_path(loc: tuple[str | int, ...], document: Any) -> Path:
    """The keys as the file has them: pydantic's location without the tags of its unions."""
    path: list[str | int] = []
    part: Any
    for i, part in enumerate(loc):
        inside = isinstance(document, Mapping) and part in document
        if inside or (isinstance(document, list) and isinstance(part, int) and part < len(document)):
            path.append(part)
            document = document[part]
        elif isinstance(document, Mapping) and i == len(loc) - 1:  # a key that is missing
            path.append(part)
    return tuple(path)


# ---------------------------------------------------------------------------------------------------------------------
# Words


def line(complaint: Complaint, positions: Mapping[Path, Position]) -> str:
    """`file:line:col: key: reason`."""
    path = complaint.path[:-1] if complaint.kind is Kind.MISSING else complaint.path
    return f"{locate(positions, path)}: {dotted(complaint.path) or 'config'}: {_short(complaint.reason, 600)}"


def dotted(path: Path) -> str:
    return ".".join(_short(part, 60) for part in path)


def written(value: Any) -> str:
    """A value as the YAML has it, a text in quotes, shortened to what is needed to find it."""
    return _short(repr(value) if isinstance(value, str) else yaml_word(value))


def yaml_word(value: Any) -> str:
    """A value as the YAML has it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _short(value: Any, limit: int = LONGEST_VALUE) -> str:
    """One line of printable text."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def locate(positions: Mapping[Path, Position], path: Path) -> str:
    """Where the key at `path` was written; a key that was not written is blamed on its section."""
    while path not in positions:
        path = path[:-1]
    return str(positions[path])
