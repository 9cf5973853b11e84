"""A data format of the user's own: a function of one raw row, which gives what dspref reads of a row.

That is a mapping in any layout of docs/rows.md, a `Preference`, a list of these, or None for a row that is left out. What it
raises is the fault of its row, told by the file and line of the function.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dspref import own_code
from dspref.data.formats import Preference
from dspref.data.normalise import LANGUAGES
from dspref.data.rows import DROP, FIELDS, RowError, Values, strings, unsound, what_is
from dspref.errors import ConfigError
from dspref.own_code import Source, told

WANTED = "a dict, a Preference, a list of these, or None"
# Of what it gives under its own name there is no column to be named.
NAMED_KEYS = (".columns", ".template")


@dataclass(frozen=True)
class Given:
    """What a function gives for one pair (or several scored answers). `literal`: as a `Preference`, whose answers are taken
    as they are, also where they begin with the prompt."""

    values: Values
    literal: bool = False

    @property
    def columns(self) -> dict[str, str]:
        """What is read of it by the names that it has only where these are named."""
        return {name: name for name in LANGUAGES if self.values.get(name) is not None}


@dataclass(frozen=True)
class OwnFormat:
    """The function that a source names as its format."""

    name: str
    source: Source
    function: Callable[[dict[str, Any]], Any]

    @property
    def identity(self) -> list[str]:
        """All that decides what it gives for a row, as far as it is the user's code."""
        return [self.name.partition(":")[2], own_code.with_imports(self.name, self.source)]

    def __call__(self, values: Values) -> list[Given | RowError]:
        """What it gives for a row, which it gets a copy of, to change as it likes. Raises RowError."""
        try:
            # A row may be asked about more than once.
            made = self.function(copy.deepcopy(dict(values)))
        except MemoryError:
            raise
        except (Exception, SystemExit) as error:
            raise self._error(told(error, self.source.path, self.source.where)) from None
        items = made if isinstance(made, list) else [] if made is None else [made]
        if not items:
            raise RowError(self.name, "left the row out", f"mend {self.source.where}", droppable=True)
        return [self._given(item, f"[{k}] of the list" if made is not item else "it") for k, item in enumerate(items)]

    def _given(self, item: Any, which: str) -> Given | RowError:
        literal = isinstance(item, Preference)
        values = _as_row(item) if literal else item
        if not isinstance(values, Mapping):
            return self._error(f"{self.source.where}: {which} is {what_is(values)}; a format gives {WANTED}")
        try:
            fault = next(filter(None, map(unsound, strings(values))), None)
        except RecursionError:
            fault = "is nested too deeply"
        if fault:
            return self._error(f"{self.source.where}: {which} {fault}")
        return Given(dict(values), literal)

    def _error(self, reason: str) -> RowError:
        return RowError(self.name, reason, "mend the row or the function, or set data.on_bad_row: drop")

    def of(self, error: RowError) -> RowError:
        """What is wrong with what it gave, as a fault of the function."""
        if error.droppable:
            return error
        mine = error.fix == DROP or any(key in error.fix for key in NAMED_KEYS)
        fix = f"mend {self.source.where}, or set data.on_bad_row: drop" if mine else error.fix
        return RowError(f"{self.name}: {error.field}", error.reason, fix)


def _as_row(pair: Preference) -> dict[str, Any]:
    """The row that says the same."""
    source, target = pair.languages or (None, None)
    answers = {"chosen": pair.chosen, "rejected": pair.rejected}
    if pair.label is not None:
        answers = {"completion": pair.chosen, "label": pair.label}
    beside = {"tools": pair.tools, "chat_template_kwargs": pair.chat_template_kwargs, "images": list(pair.images)}
    beside |= {"source_language": source, "target_language": target}
    return {"prompt": pair.prompt, **answers, **pair.given, **{name: value for name, value in beside.items() if value}}


def as_given(pair: Preference, given: Given) -> Preference:
    """The pair of a `Preference` whose texts are taken as they are, and say nothing of how those of other rows are."""
    if pair.whole is not None:
        texts = {name: given.values[name] for name in FIELDS}
        pair = replace(pair, **texts, whole=None, repeats=0)
    return replace(pair, begins=None, parted=False)


def own_format(name: str, key: str) -> OwnFormat:
    """The format that the source at `key` of the YAML names. Raises ConfigError with the key, the fault and its place."""
    try:
        return _own_format(name, os.getcwd())
    except ConfigError as error:
        raise ConfigError(f"{key}.format: {error}") from None


def fault_of(name: str) -> str | None:
    """Why a name is that of no format; None where it is one."""
    try:
        _own_format(name, os.getcwd())
    except ConfigError as error:
        return str(error)
    return None


@functools.cache
def _own_format(name: str, folder: str) -> OwnFormat:
    function, source = own_code.found(name, own_code.FORMAT, folder)
    try:
        inspect.signature(function).bind({})
    except TypeError:
        given = ", ".join(inspect.signature(function).parameters) or "nothing"
        raise ConfigError(f"{source.where}: is a function of {given}, and must be one of a row") from None
    plain = inspect.unwrap(function)
    if inspect.isgeneratorfunction(plain) or inspect.iscoroutinefunction(plain) or inspect.isasyncgenfunction(plain):
        raise ConfigError(f"{source.where}: is no plain function (yield, async); return {WANTED}")
    return OwnFormat(name, source, function)
