"""YAML as people mean it: YAML 1.2 scalars, no duplicate keys, and the position of every key.

PyYAML alone reads `5e-7` as text, `off` as False, `24:00:00` as 86400, and lets the last of two equal keys win.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import yaml

from dspref.errors import ConfigError

MAX_BYTES = 1_000_000  # a config is a page; a megabyte of YAML is an accident or an attack


class YamlError(ValueError):
    """Not YAML; the message says why, without a place."""


class Position(NamedTuple):
    """Where a key stands. `file` alone is the file itself, or an override on the command line."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError) as error:  # text that its tag or its size does not allow
            reason = f"cannot read this value ({error})"
            raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark) from None


for tag, pattern, first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), first)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse(path: Path) -> tuple[dict[str, Any], dict[tuple, Position]]:
    """The document of a YAML file as plain values, and the position of each key by its path. Raises ConfigError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes; is this a config file?")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    positions: dict[tuple, Position] = {(): Position(str(path))}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}:1:1: a config is a mapping of sections (model:, data:, ...)")
        _walk(node, (), str(path), positions, set())
        return loader.construct_document(node), positions
    except RecursionError:
        raise ConfigError(f"{path}: not valid YAML: nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ConfigError(f"{place}: not valid YAML: {_reason(error)}") from None


def parse_value(text: str) -> Any:
    """One YAML value, as in `key=value` on the command line. Raises YamlError."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _walk(node, (), "", {}, set())
        return loader.construct_document(node)
    except ConfigError as error:
        raise YamlError(str(error).partition(": ")[2]) from None
    except RecursionError:
        raise YamlError("not valid YAML: nested too deeply") from None
    except yaml.YAMLError as error:
        raise YamlError(f"not valid YAML: {_reason(error)}") from None


def apply_override(document: dict[str, Any], positions: dict[tuple, Position], override: str) -> None:
    """Set `section.key=value` in the document; the value is YAML. Numbers in the path count list items from 0.

    Raises ConfigError, with the document as it was.
    """
    path, equals, text = override.partition("=")
    where = "override '" + "".join(c if c.isprintable() else " " for c in override) + "'"
    if not equals or not all(path.split(".")):
        raise ConfigError(f"{where}: not of the form section.key=value")
    try:
        value = parse_value(text)
    except YamlError as error:
        raise ConfigError(f"{where}: {error}") from None
    keys = tuple(int(part) if part.isdecimal() and len(part) < 10 else part for part in path.split("."))
    node: Any = document
    for depth, key in enumerate(keys, start=1):
        if isinstance(node, dict) and isinstance(key, str) and node.get(key) is None:
            for absent in reversed(keys[depth:]):
                value = {absent: value}
            if any(isinstance(absent, int) for absent in keys[depth:]):
                raise ConfigError(f"{where}: {'.'.join(map(str, keys[:depth]))}: is no list; give it as a whole, [...]")
            node[key] = value
            break
        if not _can_hold(node, key):
            raise ConfigError(f"{where}: {'.'.join(map(str, keys[:depth]))}: {_no_place(node, keys[: depth - 1])}")
        if depth == len(keys):
            node[key] = value
        node = node[key]
    # What the file said below this key is gone; sections that the file lacks come from here too.
    for replaced in [known for known in positions if known[: len(keys)] == keys]:
        del positions[replaced]
    for depth in range(1, len(keys) + 1):
        positions.setdefault(keys[:depth], Position(where))


def _no_place(node: Any, above: tuple[str | int, ...]) -> str:
    """Why no key can be set there."""
    if isinstance(node, list):
        return f"no such section or list item; the list has {len(node)}, counted from 0"
    if isinstance(node, dict):
        return "no such section or list item; this is a mapping of keys, not a list"
    return f"no such section or list item: {'.'.join(map(str, above))} is a value; give it as a whole"


def _can_hold(node: Any, key: str | int) -> bool:
    if isinstance(node, list):
        return key in range(len(node))
    return isinstance(node, dict) and isinstance(key, str)


def _reason(error: yaml.YAMLError) -> str:
    reason = " ".join(str(getattr(error, "problem", None) or error).split())
    return reason + ("; indent with spaces, not tabs" if "'\\t'" in reason else "")


def _walk(node: yaml.Node, path: tuple, file: str, positions: dict[tuple, Position], above: set[int]) -> None:
    """Record the position of every key, refusing duplicate keys, aliases and keys that are not text."""
    if id(node) in above:
        raise ConfigError(f"{_place(node, file)}: aliases (*name) are not allowed in a config")
    above.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            positions[(*path, i)] = Position(file, item.start_mark.line + 1, item.start_mark.column + 1)
            _walk(item, (*path, i), file, positions, above)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise ConfigError(f"{_place(key, file)}: a key must be text")
            if len(key.value.splitlines()) > 1:
                raise ConfigError(f"{_place(key, file)}: a key must be one line")
            inner = (*path, key.value)
            if inner in positions:
                raise ConfigError(
                    f"{_place(key, file)}: {'.'.join(map(str, inner))}: duplicate key; first at {positions[inner]}"
                )
            positions[inner] = Position(file, key.start_mark.line + 1, key.start_mark.column + 1)
            _walk(value, inner, file, positions, above)


def _place(node: yaml.Node, file: str) -> Position:
    return Position(file, node.start_mark.line + 1, node.start_mark.column + 1)
