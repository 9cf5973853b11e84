"""Fields made from columns by `data.*.template`: texts with {column} fields."""

from __future__ import annotations

import string
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from dspref.data.rows import FIELDS, RowError, Values, one_line, what_is
from dspref.errors import ConfigError

TEMPLATE_KEYS = ("system", *FIELDS, "reference")


def check_template(template: Mapping[str, str], key: str = "data.train") -> None:
    """Raise ConfigError for unknown or missing keys, and for anything but plain {column} fields. `key`: the source's in the
    YAML."""
    own = f"{key}.template"
    unknown = sorted(set(template) - set(TEMPLATE_KEYS))
    missing = [key for key in ("chosen", "rejected") if key not in template]
    if unknown:
        raise ConfigError(f"{own}.{unknown[0]}: unknown key; fix: use {', '.join(TEMPLATE_KEYS)}")
    if "system" in template and "prompt" not in template:
        missing.append("prompt")
    if missing:
        raise ConfigError(f"{own}.{missing[0]}: missing; fix: give it a text with {{column}} fields")
    for name, text in template.items():
        _parse_template(f"{own}.{name}", text)


@lru_cache(maxsize=64)
def _parse_template(where: str, text: str) -> tuple[tuple[str, str | None], ...]:
    """(literal, column or None) pieces. Not str.format, which would reach attributes of the values."""
    fix = "use {column}, and {{ or }} for a brace"
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(f"{where}: {error}; fix: {fix}") from None
    for _, name, spec, conversion in pieces:
        if name is not None and (not name or name.isdigit() or set(name) & set(".[]") or spec or conversion):
            raise ConfigError(f"{where}: {one_line(name)!r} is not a plain column field; fix: {fix}")
    return tuple((literal, name) for literal, name, _, _ in pieces)


def columns_of(template: Mapping[str, str]) -> set[str]:
    """The columns whose texts a template takes."""
    return {
        name for key, text in template.items() for _, name in _parse_template(f"data.train.template.{key}", text) if name
    }


def fill(template: Mapping[str, str], values: Values) -> dict[str, str]:
    """The fields of one row, without the gold answer. Raises RowError for a column that is not there or holds no text."""
    check_template(template)
    return {key: _filled(key, text, values) for key, text in template.items() if key != "reference"}


def gold_text(template: Mapping[str, str], values: Values) -> str:
    """The gold answer of one row. Raises as `fill` does."""
    return _filled("reference", template["reference"], values)


def _filled(key: str, text: str, values: Values) -> str:
    pieces = _parse_template(f"data.train.template.{key}", text)
    # A system message that is a column and no more may be null in some rows: those have none.
    may_be_null = key == "system" and not any(literal.strip() for literal, _ in pieces)
    return "".join(literal + _value(key, name, values, may_be_null) for literal, name in pieces)


def _value(key: str, name: str | None, values: Values, may_be_null: bool) -> str:
    if name is None:
        return ""
    if name not in values:
        raise RowError(key, f"its template's column {name!r} is missing", f"use one of {sorted(map(str, values))}")
    value: Any = values[name]
    if value is None and may_be_null:
        return ""
    if not isinstance(value, str | int | float):
        reason = "null" if value is None else f"{what_is(value)}, not text"
        raise RowError(name, f"{reason}; the template of {key} needs it")
    return str(value)
