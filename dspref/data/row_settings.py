"""What a row sets beside its texts, for their rendering: tools, keyword arguments of the chat template, languages."""

from __future__ import annotations

from typing import Any

from dspref.data.normalise import LANGUAGES
from dspref.data.rows import Languages, RowError, Values, parse_json, what_is


def languages_of(fields: Values) -> Languages | None:
    """(source, target) of a row that names one of them. Raises RowError for what is no text."""
    for name in LANGUAGES:
        if not isinstance(value := fields.get(name), str | None) or (value is not None and not value.strip()):
            raise RowError(name, f"{what_is(value)}, not the code of a language" if value else "empty")
    found = (fields.get("source_language"), fields.get("target_language"))
    return None if found == (None, None) else found


def tools_of(fields: Values) -> list[Any] | None:
    """The tools of a row: a list of objects, of JSON texts of objects, or JSON text of the list."""
    fix = "write a JSON list of tools"
    tools = _parsed(fields.get("tools"), "tools", fix)
    if isinstance(tools, list):
        tools = [_tool(_parsed(tool, f"tools[{i}]", fix), f"tools[{i}]") for i, tool in enumerate(tools)]
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowError("tools", "not a list of objects", fix)
    return tools or None


def _tool(tool: Any, place: str) -> Any:
    """A tool with parameters that are an object, flat or in its `function`: a template would quote JSON text once more."""
    if not isinstance(tool, dict):
        return tool
    if isinstance(tool.get("function"), dict):
        return tool | {"function": _tool(tool["function"], f"{place}.function")}
    if not isinstance(tool.get("parameters"), str):
        return tool
    return tool | {"parameters": _parsed(tool["parameters"], f"{place}.parameters", "write a JSON schema")}


def template_kwargs_of(fields: Values) -> dict[str, Any] | None:
    fix = "write a JSON object"
    kwargs = fields.get("chat_template_kwargs")
    if not isinstance(kwargs, str) or kwargs.lstrip().startswith("{") or not kwargs.strip():
        kwargs = _parsed(kwargs, "chat_template_kwargs", fix)
    if kwargs is not None and not isinstance(kwargs, dict):
        raise RowError("chat_template_kwargs", "not an object", fix)
    return kwargs or None


def _parsed(value: Any, place: str, fix: str) -> Any:
    """A value, from JSON text too; nothing for a blank text, such as an empty cell of a CSV file."""
    if not isinstance(value, str):
        return value
    return parse_json(value, place, fix) if value.strip() else None
