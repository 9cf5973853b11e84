"""What a row holds beside its pair, in columns that may be a part of one: it is counted and told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dspref.data.formats import Preference
from dspref.data.messages import messages_of, says_the_same, squeezed, unwrapped
from dspref.data.normalise import OPTIONAL_FIELDS, conversation_in
from dspref.data.rows import CONVERSATIONS, REJECTED, Message, RowError, Text, Values, is_message

NOT_USED, USE = "these are not used", "columns.{0}: {1} uses them"
NO_PLACE = "which a text has no place for (as: chat makes a conversation)"
TOLD = {
    **{
        name: f"pair beside {name} that say something else: {NOT_USED} ({USE})".format("prompt", name)
        for name in CONVERSATIONS
    },
    **{name: f"pair beside {name} that is not its rejected answer, and is not used" for name in REJECTED},
    **{name: f"pair of text beside {name}, {NO_PLACE}" for name in OPTIONAL_FIELDS},
    "completions": f"pair beside scored completions: {NOT_USED} ({USE})".format("completions", "completions"),
    "rejected": "pair of scored completions beside a rejected answer, which is not used",
}


def unused(values: Values, named: Mapping[str, str] | None, preference: Preference, ranked: bool) -> tuple[str, ...]:
    """What is to be said of the columns of a row that are no part of its pair. `named`: columns that the user has named;
    None where a template says which are used. `ranked`: the pair is of scored completions."""
    lost = [name for name in OPTIONAL_FIELDS if isinstance(preference.prompt, str) and getattr(preference, name)]
    if named is not None:
        taken = {*named, *named.values()}
        there = {name: values[name] for name in (*TOLD, "scores", "ranks") if values.get(name) and name not in taken}
        lost += _unused(there, preference, ranked, "completions" in named or "scores" in named) if there else []
    return tuple(TOLD[name] for name in lost)


def _unused(there: Values, preference: Preference, ranked: bool, asked: bool) -> Iterator[str]:
    prompt, *answers = (_messages(part) for part in (preference.prompt, preference.chosen, preference.rejected))
    for name in CONVERSATIONS:
        history = _history(there[name], name) if name in there else []
        if ranked and history and history[-1]["role"] == "assistant":
            history = history[:-1]  # one of the answers, of which the pair has two
        if not any(_is_in(history, [*prompt, *answer], preference) for answer in answers):
            yield name
    for name in REJECTED:
        if name in there and not ranked and not _is_in(_history(there[name], name), [*prompt, *answers[1]], preference):
            yield name
    if ranked and not asked and "rejected" in there:
        yield "rejected"
    if not ranked and "completions" in there and ("scores" in there or "ranks" in there):
        yield "completions"


def _messages(part: Text) -> Sequence[Message]:
    return part if isinstance(part, list) else [{"role": "", "content": part}]


def _history(value: Any, name: str) -> list[Message]:
    """The messages of a column; none where it holds something else."""
    try:
        value = unwrapped(conversation_in(value, name))
        if isinstance(value, str):
            return [{"role": "assistant", "content": value}] if name in REJECTED else []
        items = value if isinstance(value, list) else [value]
        return messages_of(value, name) if all(map(is_message, items)) else []
    except RowError:
        return []


def _is_in(history: Sequence[Message], whole: Sequence[Message], preference: Preference) -> bool:
    """Whether a pair says what some messages say; a text of it may say several of them."""
    if isinstance(preference.prompt, str):
        text = squeezed("".join(message["content"] for message in whole))
        return all(squeezed(message.get("content")) in text for message in history)
    return all(any(says_the_same(message, other) for other in whole) for message in history)
