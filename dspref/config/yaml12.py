"""YAML as people mean it: YAML 1.2 scalars, no duplicate keys, and the position of every key.

`16k` and the like are read as `numbers` says. PyYAML alone reads `5e-7` as text, `off` as False, `24:00:00` as 86400,
and lets the last of two equal keys win.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import yaml
from yaml.composer import ComposerError

from dspref import reading
from dspref.config import numbers
from dspref.errors import ConfigError

MAX_BYTES = 1_000_000  # a config is a page; a megabyte of YAML is an accident or an attack
MAX_DEPTH = 50  # levels of nesting

CORE = "tag:yaml.org,2002:"
# The scalars of YAML 1.2's core schema: pattern, and the characters that one may begin with.
SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
PATTERNS = {f"{CORE}{name}": re.compile(rf"(?:{pattern})\Z", re.ASCII) for name, (pattern, _) in SCALARS.items()}
# A part of an override's path that counts list items.
INDEX = re.compile(r"[0-9]{1,9}\Z")
# What is a number where a key takes one, and text elsewhere: see `numbers`.
SHORTHAND = f"{CORE}shorthand"
TAGS = {*PATTERNS, SHORTHAND, f"{CORE}str", f"{CORE}seq", f"{CORE}map"}


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
    """SafeLoader with the scalars and tags of YAML 1.2's core schema, without aliases, and nested no deeper than a person
    writes: what is composed is a tree that can be walked."""

    yaml_implicit_resolvers: ClassVar[dict] = {}
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            said = "aliases (*name) are not allowed in a config; write the value out"
            raise ComposerError(None, None, said, event.start_mark)
        if self.depth >= MAX_DEPTH:
            raise ComposerError(None, None, "nested too deeply", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node is not None:
            _refuse_node(node)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:  # text that its size does not allow
            reason = f"cannot read this value ({error})"
            raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark) from None


def _refuse_node(node: yaml.Node) -> None:
    """Raise for `!env X` and the like, and for text that its tag does not allow: `!!int abc`."""
    reason = None
    if node.tag not in TAGS:
        reason = f"the tag {node.tag.replace(CORE, '!!')!r} is not known here"
    elif node.tag in PATTERNS and not (isinstance(node, yaml.ScalarNode) and PATTERNS[node.tag].match(node.value)):
        reason = f"cannot read this value as {node.tag.removeprefix(CORE)}"
    elif isinstance(node, yaml.ScalarNode) and any("\ud800" <= letter <= "\udfff" for letter in node.value):
        reason = "half a character (a surrogate) is no text"  # nothing that is written as UTF-8 could hold it
    if reason:
        raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark)


for name, (_, first) in SCALARS.items():
    _Loader.add_implicit_resolver(f"{CORE}{name}", PATTERNS[f"{CORE}{name}"], first)


_Loader.add_implicit_resolver(SHORTHAND, re.compile(rf"(?:{numbers.PATTERN})\Z", re.ASCII), list("-+0123456789"))


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    if len(text) > numbers.DIGITS:  # Python writes no number of thousands of digits, in an error's words neither
        raise ValueError(f"a number of {len(text)} digits")
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    value = yaml.SafeLoader.construct_yaml_float(loader, node)
    return numbers.Exponent(value) if re.fullmatch(r"[-+]?[0-9]+[eE]\+?[0-9]+", node.value) else value


def _construct_shorthand(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    return numbers.Shorthand(loader.construct_scalar(node))


_Loader.add_constructor(f"{CORE}int", _construct_int)
_Loader.add_constructor(f"{CORE}float", _construct_float)
_Loader.add_constructor(SHORTHAND, _construct_shorthand)


def parse(path: Path) -> tuple[dict[str, Any], dict[tuple, Position]]:
    """The document of a YAML file as plain values, and the position of each key by its path. Raises ConfigError."""
    try:
        content = reading.read_bytes(path, MAX_BYTES)
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes; is this a config file?") from None
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    return parse_text(text, str(path))


def parse_text(text: str, path: str) -> tuple[dict[str, Any], dict[tuple, Position]]:
    """The same of the text of a file. Raises ConfigError."""
    positions: dict[tuple, Position] = {(): Position(path)}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}:1:1: a config is a mapping of sections (model:, data:, ...)")
        _walk(node, (), path, positions)
        return loader.construct_document(node), positions
    except yaml.YAMLError as error:
        place = Position(path, *_place_of(error, text))
        raise ConfigError(f"{place}: not valid YAML: {_reason(error)}") from None


def parse_value(text: str) -> Any:
    """One YAML value, as in `key=value` on the command line. Raises YamlError."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _walk(node, (), "", {})
        return loader.construct_document(node)
    except ConfigError as error:
        raise YamlError(str(error)) from None
    except yaml.YAMLError as error:
        raise YamlError(f"not valid YAML: {_reason(error)}") from None


def apply_override(
    document: dict[str, Any],
    positions: dict[tuple, Position],
    override: str,
    in_full: Callable[[tuple, Any], Any] = lambda path, value: value,
) -> None:
    """Set `section.key=value` in the document; the value is YAML. Numbers in the path count list items from 0.

    `in_full` gives what the value at a path stands for: below a short form keys are set as below its long one. Raises
    ConfigError, with the document as it was.
    """
    path, equals, text = override.partition("=")
    where = f"override '{_quoted(override)}'"
    if not equals or not all(path.split(".")) or not path.isprintable():
        raise ConfigError(f"{where}: not of the form section.key=value")
    try:
        value = parse_value(text)
    except YamlError as error:
        raise ConfigError(f"{where}: {error}") from None
    keys = tuple(int(part) if INDEX.match(part) else part for part in path.split("."))
    node: Any = document
    written_out: list[tuple[Any, str | int, Any]] = []
    for depth, key in enumerate(keys, start=1):
        if isinstance(node, dict) and isinstance(key, str) and in_full(keys[:depth], node.get(key)) is None:
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
            break
        inner = in_full(keys[:depth], node[key])
        written_out.append((node, key, inner))
        node = inner
    for above, key, inner in written_out:
        above[key] = inner
    # What the file said below this key is gone; sections that the file lacks come from here too.
    for replaced in [known for known in positions if known[: len(keys)] == keys]:
        del positions[replaced]
    for depth in range(1, len(keys) + 1):
        positions.setdefault(keys[:depth], Position(where))


def _quoted(text: str) -> str:
    """On one line, and no longer than a person reads."""
    text = text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
    return text if len(text) <= 300 else f"{text[:140]} ... {text[-20:]}"


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
    reason = " ".join(str(getattr(error, "problem", None) or _unreadable(error) or error).split())
    if reason == "but found another document":
        return "holds several documents (---); give each a file of its own"
    return f"{reason}; indent with spaces, not tabs" if r"'\t'" in reason else reason


def _unreadable(error: yaml.YAMLError) -> str | None:
    if not isinstance(error, yaml.reader.ReaderError):
        return None
    return f"unacceptable character #x{ord(error.character) if isinstance(error.character, str) else error.character:04x}"


def _place_of(error: yaml.YAMLError, text: str) -> tuple[int, int]:
    """(line, column) of a fault, from 1."""
    if mark := getattr(error, "problem_mark", None):
        return mark.line + 1, mark.column + 1
    before = text[: getattr(error, "position", 0)]
    return before.count("\n") + 1, len(before) - before.rfind("\n")


def _walk(node: yaml.Node, path: tuple, file: str, positions: dict[tuple, Position]) -> None:
    """Record the position of every key, refusing duplicate keys and keys that are not one line of text."""
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            positions[(*path, i)] = _place(item, file)
            _walk(item, (*path, i), file, positions)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in (f"{CORE}str", SHORTHAND):
                raise ConfigError(f"{_in(key, file)}a key must be text")
            if not key.value.isprintable():
                raise ConfigError(f"{_in(key, file)}a key must be one line of text that prints")
            inner = (*path, key.value)
            if inner in positions:
                first = f"; first at {positions[inner]}" if file else ""
                raise ConfigError(f"{_in(key, file)}{'.'.join(map(str, inner))}: duplicate key{first}")
            positions[inner] = _place(key, file)
            _walk(value, inner, file, positions)


def _place(node: yaml.Node, file: str) -> Position:
    return Position(file, node.start_mark.line + 1, node.start_mark.column + 1)


def _in(node: yaml.Node, file: str) -> str:
    """The beginning of a message; a value on the command line has no lines to count."""
    return f"{_place(node, file)}: " if file else ""
