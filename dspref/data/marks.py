"""Marks of turns that stand within what messages say: an end token that was decoded with an answer, and others.

What a message says may hold any text, tokens of the template too. Behind an answer the template writes the end of the turn.
"""

from __future__ import annotations

from collections.abc import Sequence

from dspref.data.manners import Manners
from dspref.data.messages import is_silent, stripped
from dspref.data.rows import Message, RowError

ENDED_TWICE = "pair with {!r} at the end of an answer, which the template writes too: it was taken off"
MARKED = "pair with {!r}, which begins or ends a turn in the template, within what a message says"


def scored_in(answer: Sequence[Message], scored: str) -> list[int]:
    """The messages of an answer that a rule scores turn by turn."""
    own = [i for i, message in enumerate(answer) if message["role"] == "assistant"]
    return {"assistant": own, "last": own[-1:], "all": []}[scored]


def ending_once(answers: list[list[Message]], ends: Sequence[str], scored: str) -> tuple[list[list[Message]], list[str]]:
    """Two answers whose scored turns do not end with a token that ends a turn, as texts that were sampled and decoded with
    their special tokens do: the template writes one too. With what is to be said of it. Raises RowError."""
    known = [end for end in dict.fromkeys(ends) if end]
    written = [_without_ends(answer, known, scored_in(answer, scored)) for answer in answers]
    taken = sorted({end for _, tokens in written for end in tokens})
    if taken:
        answers = [answer for answer, _ in written]
        _refuse_empty_or_equal(answers)
    return answers, [ENDED_TWICE.format(end) for end in taken]


def _without_ends(answer: list[Message], ends: Sequence[str], scored: Sequence[int]) -> tuple[list[Message], list[str]]:
    """An answer without such a token at the end of its `scored` turns, and the white space behind; and these tokens."""
    written, taken = list(answer), []
    for i in scored:
        content = answer[i].get("content")
        text = content.rstrip() if isinstance(content, str) and not answer[i].get("tool_calls") else ""
        if end := next((end for end in ends if text.endswith(end)), None):
            written[i] = {**answer[i], "content": text[: -len(end)]}
            taken.append(end)
    return written, taken


def _refuse_empty_or_equal(answers: Sequence[list[Message]]) -> None:
    """Raise RowError where nothing, or no difference, is left without the end tokens."""
    for field, answer in zip(("chosen", "rejected"), answers):
        for i, message in enumerate(answer):
            if message["role"] == "assistant" and is_silent(message):
                raise RowError(f"{field}[{i}]", "empty answer (nothing but an end token)")
    if stripped(answers[0]) == stripped(answers[1]):
        raise RowError("rejected", "identical to chosen but for white space and end tokens at the ends")


def marks_in(messages: Sequence[Message], manners: Manners) -> list[str]:
    """Notes on the marks with which a template begins and ends turns, where they stand within what a message says."""
    marks = dict.fromkeys((*manners.ends, *manners.opens))
    texts = [content for message in messages if isinstance(content := message.get("content"), str)]
    return [MARKED.format(mark) for mark in sorted(marks) if any(mark in text for text in texts)]
