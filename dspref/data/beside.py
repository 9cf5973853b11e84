"""What a row holds beside its pair, in columns that may be a part of one, and in keys of messages: it is counted and told.

A key that switches a turn's loss off is refused where the turn would be scored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dspref.data.formats import Preference
from dspref.data.given import NAMES
from dspref.data.messages import REASONING, messages_of, says_the_same, squeezed, unwrapped
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
    "functions": f"pair beside functions, OpenAI's older tools: {NOT_USED} ({USE})".format("tools", "functions"),
    "completions": f"pair beside scored completions: {NOT_USED} ({USE})".format("completions", "completions"),
    "rejected": "pair of scored completions beside a rejected answer, which is not used",
    **{name: f"pair beside a {name}, which is not used ({USE})".format(name, name) for name in NAMES[:2]},
}

# Keys by which other tools leave a turn out of the loss: OpenAI's `weight`, ms-swift's `loss`, Axolotl's `train`.
SWITCHES = ("weight", "loss_weight", "loss", "train", "training", "trainable")
# What says who speaks to whom, and is told to no model.
NO_WORDS = frozenset(["role", "content", "name", "id", "tool_call_id", "type", *SWITCHES, *REASONING])
TRAIN_IT = "drop the key to train on the turn"


def refuse_switched_off(answers: Sequence[Sequence[Message]], scored: str) -> None:
    """Raise RowError for a turn of the assistant that the rule `scored` scores, and the row itself does not want scored."""
    sides = [[i for i, message in enumerate(answer) if message["role"] == "assistant"] for answer in answers]
    last_is_on = all(not own or _switch(answer[own[-1]]) is None for answer, own in zip(answers, sides))
    for field, answer, own in zip(("chosen", "rejected"), answers, sides):
        for i in own[-1:] if scored == "last" else own:
            if (key := _switch(answer[i])) is not None:
                reason = f"{answer[i][key]!r} leaves the turn out, and data.scored: {scored} scores it"
                fix = f"set data.scored: last, or {TRAIN_IT}" if last_is_on else f"leave the row out, or {TRAIN_IT}"
                raise RowError(f"{field}[{i}].{key}", reason, fix)


def _switch(message: Message) -> str | None:
    """The key that switches a turn off; None where it is on."""
    off = (key for key in SWITCHES if key in message and _is_off(message[key]))
    return next(off, None)


def _is_off(value: Any) -> bool:
    return value == 0 if isinstance(value, int | float) else isinstance(value, str) and value.lower() in ("0", "false")


def unread(messages: Sequence[Message], template: str) -> list[str]:
    """Notes on what the assistant's messages hold that is not trained: words under keys that the template does not read, and
    weights other than one."""
    own = [message for message in messages if message["role"] == "assistant"]
    words = {key for message in own for key in message.keys() - NO_WORDS if _is_text(message[key])}
    weights = {key for message in own for key in SWITCHES[:2] if isinstance(message.get(key), int | float)}
    weighed = {key for key in weights if any(message.get(key, 1) not in (0, 1) for message in own)}
    lost = sorted(key for key in words if not re.search(rf"""\.{re.escape(key)}\b|(['"]){re.escape(key)}\1""", template))
    return [
        *(f"pair with {key!r} of an assistant's turn, which the chat template does not read" for key in lost),
        *(
            f"pair with {key!r} of an assistant's turn, which has no effect: all scored tokens count alike"
            for key in sorted(weighed)
        ),
    ]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


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
    if "functions" in there and isinstance(preference.prompt, list) and not preference.tools:
        yield "functions"
    if ranked and not asked and "rejected" in there:
        yield "rejected"
    if not ranked and "completions" in there and ("scores" in there or "ranks" in there):
        yield "completions"
    yield from (name for name in NAMES[:2] if isinstance(there.get(name), int | float))


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
