"""A config as YAML for people: sections in the order of the schema, comments above the keys that they are about."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dspref import secrets
from dspref.config.yaml12 import YamlError, parse_value
from dspref.terminal import shown

WIDTH = 120
LONGEST = 200

Notes = Mapping[tuple, Sequence[str]]


def as_text(document: Mapping[str, Any], notes: Notes, header: Sequence[str], footer: Sequence[str]) -> str:
    """The document with its comments. Secrets are hidden."""
    lines = [*comment(header, ""), *_mapping(document, (), notes, ""), *([""] if footer else []), *comment(footer, "")]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def comment(texts: Sequence[str], indent: str) -> Iterator[str]:
    for text in texts:
        one = " ".join(shown(secrets.redact(text)).split())
        begin = f"{indent}# " + ("  " if text.startswith("  ") else "")
        yield from textwrap.wrap(
            one, WIDTH, initial_indent=begin, subsequent_indent=begin + "  ", break_long_words=False, break_on_hyphens=False
        ) or [f"{indent}#"]


def _mapping(node: Mapping[str, Any], path: tuple, notes: Notes, indent: str) -> Iterator[str]:
    for key, value in node.items():
        here = (*path, key)
        yield from comment(notes.get(here, ()), indent)
        name = scalar(key)
        if isinstance(value, Mapping) and value:
            yield f"{indent}{name}:"
            yield from _mapping(value, here, notes, indent + "  ")
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            yield f"{indent}{name}:"
            for i, item in enumerate(value):
                lines = list(_mapping(item, (*here, i), notes, indent + "    ")) if isinstance(item, Mapping) else []
                if not lines:
                    yield f"{indent}  - {flow(item)}"
                    continue
                first = next(n for n, line in enumerate(lines) if not line.lstrip().startswith("#"))
                lines[first] = f"{indent}  - {lines[first].lstrip()}"
                yield from lines
        else:
            yield f"{indent}{name}: {flow(value)}"


def flow(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(flow, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{scalar(str(k))}: {flow(v)}' for k, v in value.items())}}}"
    return scalar(value)


def scalar(value: Any) -> str:
    if not isinstance(value, str):
        return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
    text = secrets.redact(value)
    try:
        plain = type(parse_value(text)) is str and parse_value(f"[{text}, {{{text}: 1}}]") == [text, {text: 1}]
    except YamlError:
        plain = False
    return text if plain and text.isprintable() else json.dumps(text, ensure_ascii=not text.isprintable())


def short(value: Any) -> str:
    """A value of somebody else's config, in a comment."""
    text = shown(secrets.redact(flow(value) if isinstance(value, dict | list | str) else scalar(value)))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."
