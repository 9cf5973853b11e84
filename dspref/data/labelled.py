"""A row of one answer and a label becomes a `Preference` of one: unpaired data, as KTO and BCO train on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspref.data.formats import Preference, behind_last_user, pair_of
from dspref.data.messages import messages_of, unwrapped
from dspref.data.normalise import conversation_in, normalise
from dspref.data.rows import CONVERSATIONS, DROP, FIELDS, Columns, RowError, Values, find, given, kind_of, missing, what_is

COMPLETION, LABEL = "completion", "label"
# What other tools call a label: LLaMA-Factory, HALOs.
LABELS = (LABEL, "kto_tag")
ANSWERS = ("chosen", "rejected")
WORDS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
TRUE_OR_FALSE = f"write true for a desirable answer, false for another; or {DROP}"


def is_labelled(values: Values, columns: Columns | None) -> bool:
    """Whether a row has one answer with a label: where one of their columns is named, whatever else it has; by their own
    names, where no column holds two answers."""
    named = given(columns)
    if named.keys() & {COMPLETION, LABEL}:
        return True
    if any(values.get(named.get(field, field)) is not None or field in named for field in ANSWERS):
        return False
    labelled = _label_of(values, named) is not None
    if COMPLETION in values and any(name in values and name not in named.values() for name in LABELS):
        return labelled or values.get(COMPLETION) is not None  # one of them may be null, which is told
    return labelled and _history(values) is not None


def to_answer(
    values: Values, columns: Columns | None = None, *, as_: str | None = None, chat_model: bool = False
) -> Preference:
    """The one answer of a row, with its label. Raises RowError."""
    named = given(columns)
    if beside := sorted(named.keys() & {*ANSWERS, "completions", "scores", "ranks"}):
        raise RowError(f"columns.{beside[0]}", "an answer with a label and others are given", "name one or the other")
    label = _read(values, named)
    row = {name: value for name, value in values.items() if name not in (*ANSWERS, *LABELS)}
    row |= _answer(values, named, as_)
    ours = {key: name for key, name in named.items() if key not in (COMPLETION, LABEL)}
    try:
        fields = normalise(row, ours, None, as_, chat_model, repeated=False)
        return pair_of(fields | {LABEL: label}, row, ours)
    except RowError as error:
        raise of_one(error) from None


def of_one(error: RowError) -> RowError:
    """The error of a pair that is made of one answer, in words of that."""
    field, reason, fix = (_said(text) for text in (error.field, error.reason, error.fix))
    return RowError(field, reason, fix, droppable=error.droppable)


def _said(text: str) -> str:
    for side in ANSWERS:
        text = text.replace(side, COMPLETION)
    return text


def _label_of(values: Values, named: Mapping[str, str]) -> str | None:
    return next((name for name in LABELS if values.get(name) is not None and name not in named.values()), None)


def _read(values: Values, named: Mapping[str, str]) -> bool:
    """The label: true or false, 1 or 0, as text too."""
    empty = next((name for name in LABELS if name in values), LABEL)
    name = named.get(LABEL) or _label_of(values, named) or empty
    there, value = find(values, name)
    if not there:
        raise missing(LABEL, values, name)
    if LABEL not in named and all(values.get(other) is not None for other in LABELS):
        first, second = (_meant(values[other]) for other in LABELS)
        if first != second:
            raise RowError(LABEL, f"{' and '.join(LABELS)} say different things", "name one: data.train.columns.label")
    known = _meant(value)
    if known in (0, 1) and isinstance(known, bool | int | float):  # True is 1, and 1.0 too
        return bool(known)
    said = repr(value) if isinstance(value, str | int | float) else what_is(value)
    raise RowError(LABEL, f"{said}, neither true nor false", TRUE_OR_FALSE)


def _meant(value: Any) -> Any:
    return WORDS.get(value.strip().lower()) if isinstance(value, str) else value


def _answer(values: Values, named: Mapping[str, str], as_: str | None) -> dict[str, Any]:
    """The answer as both of a pair; of a conversation without a completion beside it, with the prompt before."""
    name = named.get(COMPLETION, COMPLETION)
    there, value = find(values, name)
    if there and value is not None:
        return dict.fromkeys(ANSWERS, value)
    history = _history(values) if COMPLETION not in named else None
    if history is None or as_ == "text":
        raise missing(COMPLETION, values, name) if not there else RowError(COMPLETION, "null")
    whole = unwrapped(conversation_in(values[history], history))
    if kind_of(whole) != "chat":
        raise RowError(history, f"{what_is(whole)}, not a conversation")
    messages = messages_of(whole, history)
    start = behind_last_user(messages)
    if not messages[start:]:
        raise RowError(f"{history}[{len(messages) - 1}]", "a user's message, and no answer follows it")
    if not start:
        raise RowError(history, "no user's message, so that no prompt comes before the answer")
    return {FIELDS[0]: messages[:start], **dict.fromkeys(ANSWERS, messages[start:])}


def _history(values: Values) -> str | None:
    return next((name for name in CONVERSATIONS if values.get(name) is not None), None)
