"""The assistant's turns of an answer in what a template rendered: where each begins, and which tokens end it.

Raises RowError where the template drops or rewrites what the model is to write in one, or hides where it lies.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from dspref.data.manners import Manners, rendered, shared_length
from dspref.data.marks import scored_in
from dspref.data.messages import REASONING
from dspref.data.printed import Printed, called, passed, said
from dspref.data.rows import Message, RowError, one_line

DECIDE = "set model.chat_template to one that does not, or data.scored: all to train on it as it is"
CALL_IT = "set model.chat_template to one that prints the calls of tools"
GO_ON = (
    "let the answer go on from there, take out of chat_template_kwargs what writes that, or set data.scored: all to train "
    "on it as it is"
)
ANOTHER = "set model.chat_template to another"
NO_END = RowError(
    "chat_template",
    "it writes no end token behind an answer, so that the model would never learn to stop",
    "set model.chat_template to one that ends a turn, or data.scored: all to train on it as it is",
)


class Hidden(RowError):
    """A turn of a conversation whose place cannot be told, or of which a part is dropped. Other turns may be scored."""


class Turn(NamedTuple):
    """An assistant's turn in a rendered text: all before what the model writes, and the tokens of which one ends it.
    `closing`: all up to the turn's end, where its last end token counts; None where that is not known, and then of the end
    tokens behind the opening the one after `inside` others, which the message itself holds."""

    opening: str
    closing: str | None
    ends: tuple[str, ...]
    inside: int = 0


@dataclass
class Conversation:
    """One answer of a pair, and the text that it was rendered to together with its prompt."""

    tokenizer: Any
    manners: Manners
    how: dict[str, Any]
    prompt: list[Message]
    answer: list[Message]
    full: str
    field: str

    def again(self, answer: list[Message]) -> str:
        """The whole text with another answer."""
        return rendered(self.tokenizer, [*self.prompt, *answer], **self.how)

    def turns(self, scored: str, asked: str | None) -> Iterator[Turn]:
        """The assistant's turns of the answer, or the last of them. Raises RowError where the template hides one."""
        own = self.scored_by(scored)
        if own and not self.manners.ends:
            raise NO_END
        if own[:-1] and not self.manners.ends_every_turn:
            reason = "it ends the last turn of a conversation alone, and the answer has several"
            raise Hidden("chat_template", reason, f"{ANOTHER}, or data.scored: all")
        for i in own:
            opening = self._opening(i, asked if i == 0 else None)
            closing = self._closing(i)
            self._refuse_loss(i, opening, closing)
            yield self._turn(i, opening, closing)

    def scored_by(self, scored: str) -> list[int]:
        """The messages of the answer that a rule scores turn by turn."""
        return scored_in(self.answer, scored)

    def printed(self, asked: str) -> Printed:
        """The answer in its rendering, behind what is `asked`."""
        own = self.full[shared_length(asked + self.manners.header * (not self.manners.asks), self.full) :]
        return Printed(self.answer, self.full, own, self.manners, self.again)

    def with_prompt(self, head: str) -> Printed:
        """Prompt and answer in their rendering, behind what the template puts there first."""
        messages, own = [*self.prompt, *self.answer], self.full.removeprefix(head)
        return Printed(messages, self.full, own, self.manners, lambda again: rendered(self.tokenizer, again, **self.how))

    def can_score_last(self) -> bool:
        """Whether `data.scored: last` would mend what the other rule cannot."""
        try:
            return bool(list(self.turns("last", None)))
        except RowError:
            return False

    def _closing(self, i: int) -> str | None:
        """The text up to the end of message `i`; None where what follows changes it."""
        closing = self.full if i + 1 == len(self.answer) else self.again(self.answer[: i + 1])
        return closing if self.full.startswith(closing) else None

    def _turn(self, i: int, opening: str, closing: str | None) -> Turn:
        """The turn of message `i`, with the tokens that end it under the settings of this row."""
        ends = self.manners.ends
        if closing is None:
            return Turn(opening, None, ends, sum(map(_written(self.answer[i]).count, ends)))
        own = closing[shared_length(opening, closing) :]
        if not any(end in own for end in ends):
            found = list(self.manners.tokens.finditer(own.rstrip()))
            if not found or found[-1].end() < len(own.rstrip()):
                raise NO_END
            ends = (found[-1].group(),)
        return Turn(opening, closing, ends)

    def _opening(self, i: int, asked: str | None) -> str:
        """The text before what message `i` of the answer says; `asked`: with the generation prompt, where that is known."""
        before = [*self.prompt, *self.answer[:i]]
        if self.manners.asks:
            asked = asked or rendered(self.tokenizer, before, add_generation_prompt=True, **self.how)
            if self.full.startswith(asked):
                return asked
        base = rendered(self.tokenizer, before, **self.how)
        if not self.full.startswith(base):
            reason = f"it renders what comes before {self.field}[{i}] otherwise than in the whole, which hides the turn"
            raise Hidden("chat_template", reason, f"{ANOTHER}, or data.scored: all")
        return base + self.manners.header

    def _refuse_loss(self, i: int, opening: str, closing: str | None) -> None:
        """Raise RowError where the template drops or rewrites text that the model is to write in message `i`."""
        place, text = f"{self.field}[{i}]", closing or self.full
        own, messages = text[shared_length(opening, text) :], self.answer[i : i + 1 if closing else None]
        there = Printed(messages, text, own, self.manners, lambda rest: self.again([*self.answer[:i], *rest]))
        for part in said(self.answer[i]):
            if not there.has(0, part, opening):
                if not self.full.startswith(opening) and replace(there, own=self._behind_header(opening)).has(0, part):
                    reason = f"it does not go on from what opens an answer in the chat template: {self.manners.header!r}"
                    raise Hidden(f"{place}.{part.key}", reason, GO_ON)
                reason = f"the chat template drops or rewrites it: {one_line(part.text, 80)!r}"
                raise Hidden(f"{place}.{part.key}", reason, DECIDE)
        for parts, what in ((called, "call of"), (passed, "argument")):
            for part in parts(self.answer[i]):
                if not there.has(0, part):
                    reason = f"the chat template drops the {what} {one_line(part.text, 80)!r}"
                    # Without the call nothing is left of a turn that says no more.
                    fix = DECIDE if any(word.text.strip() for word in said(self.answer[i])) else CALL_IT
                    raise Hidden(f"{place}.tool_calls", reason, fix)

    def _behind_header(self, opening: str) -> str:
        return self.full[len(opening) - len(self.manners.header) :]

    def refuse_losses(self) -> None:
        """The same of all turns, where it is not known where each stands."""
        for i in self.scored_by("assistant"):
            self._refuse_loss(i, "", None)


def _written(message: Message) -> str:
    """What a template may print of an assistant's message: a call may pass any text, end tokens too."""
    return json.dumps([message.get(key) for key in ("content", *REASONING, "tool_calls")], ensure_ascii=False, default=str)
