"""A dspref config in the making, from the keys of another trainer: what is taken, where it goes, and what is left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dspref.config.foreign_values import VALUES, WHOLE_VALUES
from dspref.config.written import short
from dspref.config.yaml12 import parse_value

SECTIONS = ("model", "reference", "data", "objective", "train", "deepspeed", "checkpoint", "log", "export", "output_dir")
# Numbers of steps that mean none.
EMPTY_STEPS = (None, -1, 0, False)
TRUE, FALSE = (True, 1, "true", "True", "auto", "yes"), (False, 0, "false", "False", "no", "none")


@dataclass
class Draft:
    theirs: dict[str, Any]
    dialect: str
    objective: str
    gpus: int
    defaults: dict[str, Any]
    document: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(SECTIONS))
    notes: dict[tuple, list[str]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)
    """What their trainer takes where the file says nothing, as far as it was put."""

    def take(self, *names: str, default: bool = True) -> Any:
        """The first value that is not empty among these keys, which are done with then; else what their trainer takes."""
        found, said = None, False
        for name in names:
            if name in self.theirs:
                said = True
                value = self.theirs.pop(name)
                if is_empty(value):
                    self.empty.append(name)
                elif found is None:
                    found = value
                else:
                    self.leave(name, value, f"{names[0]} goes before it" if names[0] != name else "it is given twice")
        if found is None and default and not said and (known := [name for name in names if name in self.defaults]):
            found = self.defaults[known[0]]
            self.assumed.append(f"{known[0]} {found}")
        return found

    def has(self, *names: str) -> bool:
        return any(not is_empty(self.theirs.get(name)) for name in names)

    def flag(self, *names: str) -> bool | None:
        value = self.take(*names)
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
        self.put(path, ours, "" if ours == value else f"{key}: {short(value)}")

    def leave(self, key: str, value: Any, why: str) -> None:
        self.left.append(f"  {key}: {short(value)} -- {why}")

    def rest(self) -> Iterator[tuple[str, Any]]:
        """What nobody took, which is done with now."""
        while self.theirs:
            key = next(iter(self.theirs))
            yield key, self.theirs.pop(key)


def is_empty(value: Any) -> bool:
    return value is None or value == "" or value == [] or value == {}
