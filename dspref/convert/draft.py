"""A dspref config in the making, from the keys of another trainer: what is taken, where it goes, and what is left."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dspref.config import hints
from dspref.config.foreign import FOREIGN_KEYS
from dspref.config.foreign_values import VALUES, WHOLE_VALUES
from dspref.config.yaml12 import parse_value
from dspref.convert.written import short

SECTIONS = (
    "model",
    "reference",
    "data",
    "objective",
    "train",
    "deepspeed",
    "parallel",
    "checkpoint",
    "log",
    "export",
    "output_dir",
)
# Numbers of steps that mean none.
EMPTY_STEPS = (None, -1, 0, False)
TRUE, FALSE = (True, 1, "true", "True", "auto", "yes"), (False, 0, "false", "False", "no", "none")


# Behind all lines of a file.
NOWHERE = 10**9
QUOTED = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[tT]rue|[fF]alse")


@dataclass
class Draft:
    theirs: dict[str, Any]
    dialect: str
    objective: str
    gpus: int
    defaults: dict[str, Any]
    document: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(SECTIONS))
    notes: dict[tuple, list[str]] = field(default_factory=dict)
    left: list[tuple[int, str]] = field(default_factory=list)
    """(line, what is said) of what was not taken over."""
    empty: list[str] = field(default_factory=list)
    assumed: dict[str, Any] = field(default_factory=dict)
    """What their trainer takes where the file says nothing, as far as it was put."""
    unread: dict[str, str] = field(default_factory=dict)
    """Keys whose values are computed there, and the code."""
    lines: dict[str, int] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    """How a key is written there, where it goes by another name here: `trl.beta`."""
    file: str = ""
    remarks: dict[str, str] = field(default_factory=dict)
    opened: list[str] = field(default_factory=list)
    """Keys of ours that are to be filled in, as theirs are computed."""
    later: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Keys of ours that are to be filled in anyhow: the value, and what is said of it."""
    given: dict[str, Any] = field(init=False)
    """Every key of theirs, also those that are done with."""
    called: dict[str, str] = field(default_factory=dict)
    """A name that a key may have -> the one that it has there."""

    def __post_init__(self) -> None:
        self.given = dict(self.theirs)

    def take(self, *names: str, default: bool = True) -> Any:
        """The first value that is not empty among these keys, which are done with then; else what their trainer takes."""
        found, said, first = None, any(name in self.unread for name in names), ""
        for name in names:
            if name in self.theirs:
                said = True
                value = self.theirs.pop(name)
                if is_empty(value):
                    self.empty.append(name)
                elif found is None:
                    found, first = value, name
                else:
                    self.leave(name, value, f"{self.name(first)} goes before it")
        self.called |= dict.fromkeys(names, first) if first else {}
        if found is None and default and not said and (known := [name for name in names if name in self.defaults]):
            found = self.assumed[known[0]] = self.defaults[known[0]]
        return found

    def absorb(self, outer: str, inner: Mapping[Any, Any], renamed: Mapping[str, str] | None = None) -> None:
        """Take the keys of a mapping of theirs for keys of the file, where it has none of that name."""
        for key, value in inner.items():
            name = (renamed or {}).get(str(key), str(key))
            if is_empty(self.theirs.get(name)):
                self.theirs[name] = self.given[name] = value
                self.names[name] = f"{outer}.{key}"
            elif not is_empty(value):
                self.leave(f"{outer}.{key}", value, f"{self.name(name)} goes before it")

    def has(self, *names: str) -> bool:
        return any(not is_empty(self.theirs.get(name)) for name in names)

    def computes(self, *names: str) -> bool:
        """Whether one of these keys has a value that is computed there."""
        return any(name in self.unread for name in names)

    def name(self, key: str) -> str:
        """What a key is called there."""
        key = key if key in self.given or key in self.unread else self.called.get(key, key)
        return self.names.get(key, key)

    def sources(self, path: str, above: bool = True) -> list[str]:
        """The keys of theirs that have a say in a key of ours, or else in one above it."""
        while path:
            found = [key for key in self.given if key not in self.empty and path in homes(key)]
            if found or "." not in path or not above:
                return found
            path = path.rpartition(".")[0]
        return []

    def flag(self, *names: str, default: bool = True) -> bool | None:
        value = self.take(*names, default=default)
        if value is None or value in TRUE or value in FALSE:
            return None if value is None else value in TRUE
        self.leave(names[0], value, "is neither true nor false")
        return None

    def put(self, path: str, value: Any, note: str = "") -> None:
        """Set a key, with a comment above it."""
        *above, last = path.split(".")
        node = self.document
        for key in above:
            inner = node.get(key)
            node[key] = inner if isinstance(inner, dict) else {}
            node = node[key]
        node[last] = value
        if note:
            self.note(path, note)

    def note(self, path: str, text: str) -> None:
        self.notes.setdefault(tuple(path.split(".")), []).append(text)

    def get(self, path: str) -> Any:
        node: Any = self.document
        for key in path.split("."):
            node = node.get(key) if isinstance(node, dict) else None
        return node

    def translate(self, path: str, key: str, value: Any) -> None:
        """Set a key to a value of theirs, by the name that it has here."""
        last = path.split(".")[-1]
        word = "null" if value is None else str(value).lower()
        if last in WHOLE_VALUES and word in WHOLE_VALUES[last]:
            self.put(path, parse_value(WHOLE_VALUES[last][word]))
            return
        ours = VALUES.get(last, {}).get(word, value) if isinstance(value, str | bool | int) else value
        self.put(path, ours, "" if ours == value else f"{self.name(key)}: {short(value)}")

    def leave(self, key: str, value: Any, why: str) -> None:
        """Tell, by the name that it has there, that a key is not taken over."""
        self.leave_code(key, short(value), why)

    def leave_code(self, key: str, text: str, why: str) -> None:
        name = self.name(key)
        line = next((self.lines[one] for one in (name, name.split(".")[0], key) if one in self.lines), NOWHERE)
        where = f"{self.file}:{line}: " if line != NOWHERE else ""
        self.left.append((line, f"  {where}{name}: {text} -- {why}"))

    def assume(self, key: str, value: Any) -> Any:
        """A value that their trainer takes where the file says nothing."""
        self.assumed[key] = value
        return value

    def rest(self) -> Iterator[tuple[str, Any]]:
        """What nobody took, which is done with now."""
        while self.theirs:
            key = next(iter(self.theirs))
            yield key, self.theirs.pop(key)


def is_empty(value: Any) -> bool:
    return value is None or value == "" or value == [] or value == {}


def homes(key: str) -> set[str]:
    """The keys of ours that one of theirs has a say in."""
    named = {".".join(map(str, path)) for path in hints.named(FOREIGN_KEYS.get(key, ""))}
    return named or {*hints.homes_of(key)} | ({f"model.lora.{key}"} if key.startswith("lora_") else set())


def of_pairs(given: Mapping[str, Any]) -> bool:
    """Whether a config of KTO is of pairs, by the loss that took them as two answers each."""
    return "kto_pair" in (given.get("pref_loss"), given.get("loss_type"))


def as_list(value: Any) -> Any:
    """A text with commas as the list that it stands for: `wandb, tensorboard`."""
    if not isinstance(value, str) or "," not in value:
        return value
    return [quoted(word.strip()) for word in value.strip("[]() ").split(",") if word.strip()]


def quoted(value: Any) -> Any:
    """A number or a truth value that stands in quotes."""
    if not isinstance(value, str) or not QUOTED.fullmatch(value.strip()):
        return value
    return parse_value(value.strip())
