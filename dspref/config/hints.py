"""What to write instead of a key or a value that is not known: one of another tool, a slip of the keyboard, or a key of
dspref's own in the wrong section.

A hint names what exists and loads; where nothing is close, there is none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from dspref.config.absent import NOT_NEEDED
from dspref.config.foreign import FOREIGN_KEYS
from dspref.config.foreign_values import STRANGERS, VALUES, WHOLE_VALUES
from dspref.config.sections import (
    DEFAULT_OBJECTIVE,
    OBJECTIVE_SECTIONS,
    TOP,
    BemaSection,
    GenerationSection,
    LoraSection,
    Section,
    SourceSection,
)
from dspref.config.within import WITHIN
from dspref.objectives import OBJECTIVES, Family, defaults

SECTIONS = "model|reference|data|objective|train|parallel|checkpoint|log|export"
LOSS = re.compile(r"write loss_type: (\w+)")
NAMED = re.compile(rf"\b(?:(?:{SECTIONS})(?:\.\w+)+|output_dir\b|deepspeed\b)")
# What `dspref convert` writes where a value is to be written by a person; where a path is, with a word behind it.
FILL_IN, STILL_OPEN = "FILL_IN", "is still to be filled in"

Path = tuple[str | int, ...]


def of_key(key: str, parent: Path, section: type[Section] | None) -> tuple[str, set[Path]]:
    """What to say of a key that a section does not know, behind a semicolon, and the keys that were meant by it."""
    siblings = list(section.model_fields) if section else []
    owners = [name for name, family in OBJECTIVES.items() if key in family_keys(name, family)]
    with_own = parent == ("objective",) and section is not None and section not in WITHIN
    within = WITHIN.get(OBJECTIVE_SECTIONS[DEFAULT_OBJECTIVE] if with_own else section, {}) if section else {}
    if section and (hint := within.get(key)):
        here = {(*parent, hint.split(":")[0].split(" ")[0])} if section is SourceSection else named(hint)
        return f"in dspref this is {hint}", here
    if owners and parent == ("objective",) and not with_own:
        return f"it belongs to objective {' or '.join(owners)}", set()
    if hint := FOREIGN_KEYS.get(key):
        return f"in dspref this is {hint}", named(hint)
    if why := NOT_NEEDED.get(key):
        return f"drop it: {why}", set()
    if homes := [home for home in homes_of(key) if home != ".".join(map(str, (*parent, key)))]:
        return f"in dspref this is {' or '.join(homes)}", named(" or ".join(homes))
    if "." in key and key.split(".")[-1] in all_homes() and key in all_homes()[key.split(".")[-1]]:
        section_name, _, rest = key.partition(".")
        return f"in dspref this is {key}; write {section_name}: {{{rest}: ...}}", named(key)
    if "." in key:
        *above, last = key.split(".")
        inner = of_key(last, tuple(above), None)
        if inner[0].startswith(("in dspref", "drop it")):
            return inner
    if close := near(key, siblings):
        return f"did you mean '{close}'?", {(*parent, close)}
    if parent == () and (close := near(key, all_homes())) and len(homes_of(close)) == 1:
        return f"did you mean {homes_of(close)[0]}?", named(homes_of(close)[0])
    return f"known here: {', '.join(siblings)}" if siblings else "", set()


def of_value(key: str, value: Any, choices: Sequence[str], in_list: bool = False) -> str:
    """What to write for a value that is none of the choices, behind a semicolon, or nothing. `in_list`: it is an item of
    what the key holds."""
    word = "null" if value is None else str(value).lower()
    if choices and (whole := WHOLE_VALUES.get(key, {}).get(word)):
        return f"; write {key}: {whole}" if in_list else f"; write {whole}"
    parts = [part.strip() for part in word.split(",")]
    if len(parts) > 1 and set(parts) <= set(choices):
        return f"; write [{', '.join(parts)}]"
    if choices and (why := STRANGERS.get(key, {}).get(word)):
        return f"; {why}"
    meant = VALUES.get(key, {}).get(word)
    close = meant if meant in choices else near(word, choices) if isinstance(value, str) else None
    if not close:
        return ""
    return f"; write {close}" if close.isdecimal() else f"; did you mean '{close}'?"


def objective_of(word: Any) -> str:
    """The objective section that a word stands for."""
    name = word.lower() if isinstance(word, str) else ""
    name = VALUES["loss_type"].get(name, name)
    having = [name] if name in OBJECTIVES else [f for f, about in OBJECTIVES.items() if name in about.losses]
    family = "simpo" if "simpo" in having else next(iter(having), None)  # cpo would add the chosen answers' NLL
    return f"{{name: {family or 'dpo'}}}" if family in (None, name) else f"{{name: {family}, loss_type: {name}}}"


def of_objective(name: Any) -> str:
    """What to write for a name that is no objective but perhaps a loss of one, behind a semicolon, or nothing."""
    if not isinstance(name, str):
        return ""
    word = VALUES["loss_type"].get(name.lower(), name.lower())
    if word not in OBJECTIVES and any(word in about.losses for about in OBJECTIVES.values()):
        return f"; write objective: {objective_of(word)}"
    for family, about in OBJECTIVES.items():
        if word not in OBJECTIVES and (instead := about.refused.get(word)):
            return "; " + LOSS.sub(rf"write objective: {{name: {family}, loss_type: \1}}", instead)
    if why := STRANGERS["loss_type"].get(word):
        return f"; {why}"
    close = near(word, [choice for choice in OBJECTIVES if word == choice or len(choice) > 4])
    return f"; did you mean '{close}'?" if close else ""


def of_loss(loss_type: str, family: str) -> str | None:
    """What to write for a loss that another family has, or that goes by another name there."""
    word = VALUES["loss_type"].get(loss_type, loss_type)
    if word in OBJECTIVES[family].losses:
        return None
    if any(word in about.losses for about in OBJECTIVES.values()):
        return f"write objective: {objective_of(word)}"
    refused = [instead for about in OBJECTIVES.values() if (instead := about.refused.get(loss_type))]
    return LOSS.sub(r"write objective: {name: dpo, loss_type: \1}", refused[0]) if refused else None


def family_keys(name: str, family: Family) -> set[str]:
    return {*defaults(name, family.losses), *(["loss_weights"] if family.mixes else [])}


def named(hint: str) -> set[Path]:
    """The keys that a hint names."""
    return {tuple(path.split(".")) for path in NAMED.findall(hint)}


def homes_of(key: str) -> list[str]:
    """Where dspref has a key of this name; nothing for names that are common to many."""
    found = all_homes().get(key, [])
    return found if len(found) <= 2 else []


@cache
def all_homes() -> dict[str, list[str]]:
    homes: dict[str, list[str]] = {}

    def note(prefix: str, names: Iterable[str]) -> None:
        for name in names:
            if f"{prefix}.{name}" not in homes.setdefault(name, []):
                homes[name].append(f"{prefix}.{name}")

    for name, field in TOP.model_fields.items():
        homes.setdefault(name, []).append(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            note(name, field.annotation.model_fields)
    note("model.lora", LoraSection.model_fields)
    note("reference.bema", BemaSection.model_fields)
    note("log.generation", GenerationSection.model_fields)
    note("data.train", SourceSection.model_fields)
    for section in OBJECTIVE_SECTIONS.values():
        note("objective", section.model_fields)
    return homes


def near(word: str, choices: Iterable[str]) -> str | None:
    """The choice that a word is a slip of the keyboard away from, or begins with; None where no one is meant for sure."""
    folded, choices = word.lower().replace("-", "_"), list(choices)
    if same := [choice for choice in choices if choice.lower() == folded]:
        return same[0]
    ranked = sorted((slips(folded, choice.lower()), choice) for choice in choices)
    if ranked and ranked[0][0] <= _allowed(max(len(folded), len(ranked[0][1]))):
        return ranked[0][1]
    longer = [choice for choice in choices if len(folded) > 3 and choice.lower().startswith(folded + "_")]
    return longer[0] if len(longer) == 1 else None


def _allowed(length: int) -> int:
    """Slips that a word of this length may have: none of three letters, among which dpo, cpo and ipo differ by one."""
    return 0 if length < 4 else 1 if length < 7 else 2 if length < 12 else 3


def slips(a: str, b: str) -> int:
    """Letters added, left out, exchanged or swapped with their neighbour between two words (Damerau-Levenshtein)."""
    if abs(len(a) - len(b)) > 3:
        return abs(len(a) - len(b))
    rows = [list(range(len(b) + 1))]
    for i, letter in enumerate(a, start=1):
        row = [i]
        for j, other in enumerate(b, start=1):
            row.append(min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (letter != other)))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                row[j] = min(row[j], rows[-2][j - 2] + 1)
        rows.append(row)
    return rows[-1][-1]
