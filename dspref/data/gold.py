"""The gold answer of a row: a third one, better than both of its pair, as TPO trains on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspref.data.formats import Preference, with_answer
from dspref.data.messages import answer_of, behind, unwrapped
from dspref.data.normalise import conversation_in
from dspref.data.row_template import gold_text
from dspref.data.rows import RowError, Text, Values, find, missing

REFERENCE = "reference"


def gold_of(
    pair: Preference, values: Values, named: Mapping[str, str], template: Mapping[str, str] | None = None
) -> Preference:
    """The gold answer of a row to the prompt of its `pair`: a text, messages, or the whole conversation. Raises RowError."""
    name, value = (REFERENCE, gold_text(template, values)) if template else _found(values, named[REFERENCE])
    answer = answer_of(unwrapped(conversation_in(value, name)), name, behind=pair.prompt)
    return with_answer(pair, _behind_prompt(pair, answer, name), name)


def _found(values: Values, name: str) -> tuple[str, Any]:
    there, value = find(values, name)
    if not there:
        raise missing(REFERENCE, values, name)
    if value is None:
        raise RowError(name, "null, and each row needs an answer that is better than both")
    return name, value


def _behind_prompt(pair: Preference, answer: Text, name: str) -> Text:
    """The answer without the prompt that it repeats."""
    prompt = pair.prompt
    if isinstance(prompt, str) != isinstance(answer, str):
        raise RowError(name, "messages behind a prompt that is text", "make prompt and answers the same kind")
    if isinstance(prompt, list) and isinstance(answer, list):
        return behind(prompt, answer)
    # Of texts the answers of a row repeat their prompt, or none of them does.
    whole = pair.whole is not None or pair.repeats > 0
    return answer.removeprefix(prompt) if whole and isinstance(answer, str) and isinstance(prompt, str) else answer
