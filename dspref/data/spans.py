"""A pair cut into runs of tokens of one kind, with what does not show made visible: for people to look at.

Marks stand for what they mean and nothing else: where a text has one of these characters itself, it is written as an escape.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dspref.data.show import WORTH_LEAVING_OUT, pieces
from dspref.data.truncate import TokenizedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Around scored tokens where there is no colour; a line end, a space and a tab that would not be seen; where tokens were cut,
# and where some are not shown.
OPEN, CLOSE, LINE, SPACE, TAB, CUT, MORE = "⟦", "⟧", "⏎", "␣", "⇥", "✂", "⋯"
MARKS = frozenset((OPEN, CLOSE, LINE, SPACE, TAB, CUT, MORE))
SIDES = ("prompt", "chosen", "rejected")


class Run(NamedTuple):
    """Neighbouring tokens of one kind, and the text of each; a letter of several tokens is the last one's. `left_out`: so
    many tokens stand here that are not shown."""

    ids: list[int]
    texts: list[str]
    scored: bool = False
    special: bool = False
    left_out: int = 0

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Section(NamedTuple):
    """The prompt or an answer of a pair."""

    name: str
    runs: list[Run]
    tokens: int
    scored: int
    lost: int
    """Tokens that truncation took."""
    gap: int | None
    """How many of those left stand before the ones that were lost; None where that is not known, or none was lost."""


def sections(
    pair: TokenizedPair,
    tokenizer: PreTrainedTokenizerBase,
    uncut: Sequence[int] | None = None,
    gap: int | None = None,
    limits: Sequence[int | None] = (None, None, None),
) -> list[Section]:
    """Prompt, chosen and rejected. `uncut`: their tokens before truncation; `gap`: how many of the prompt's stand before
    those that it lost. `limits`: of each, the most tokens that are shown, half of them from its end."""
    special = special_ids(tokenizer)
    masks = [np.zeros(len(pair.prompt), dtype=bool), pair.chosen_scored, pair.rejected_scored]
    found = []
    for k, (name, ids) in enumerate(zip(SIDES, pair[:3])):
        own = masks[k]
        mask = np.ones(len(ids), dtype=bool) if own is None else own
        lost = int(uncut[k]) - len(ids) if uncut is not None else 0
        where = (gap if name == "prompt" else len(ids)) if lost else None
        runs = runs_of(ids.tolist(), mask.tolist(), tokenizer, special, where, limits[k])
        found.append(Section(name, runs, len(ids), int(mask.sum()), lost, where))
    return found


def special_ids(tokenizer: Any) -> frozenset[int]:
    """The ids of tokens that stand for no text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {number for number, token in added.items() if token.special}


def runs_of(
    ids: list[int], scored: list[bool], tokenizer: Any, special: frozenset[int], cut: int | None, limit: int | None
) -> list[Run]:
    """Runs of tokens of one kind; they end where tokens were `cut`, too, and at those left out beyond `limit`."""
    size = len(ids)
    half = size if limit is None or size <= limit + WORTH_LEAVING_OUT else limit // 2
    # Of a long text only what is shown is decoded.
    parts = [range(size)] if half == size else [range(half), range(size - half, size)]
    runs: list[Run] = []
    for part in parts:
        if part.start:
            runs.append(Run([], [], left_out=size - 2 * half))
        words = pieces(ids[part.start : part.stop], tokenizer)
        kinds = [(k >= cut if cut is not None else False, scored[k], ids[k] in special) for k in part]
        at = part.start
        for (_, is_scored, is_special), members in groupby(kinds):
            stop = at + len(list(members))
            own = words[at - part.start : stop - part.start]
            runs.append(Run(ids[at:stop], own, is_scored, is_special))
            at = stop
    return runs


def visible(words: Sequence[str]) -> list[str]:
    """Texts that follow one another, without control characters and with what would not be seen: line ends, tabs, and spaces
    at the ends of a line or beside another."""
    whole = "".join(words)
    shown, at = [], 0
    for word in words:
        shown.append("".join(_visible(whole, at + k) for k in range(len(word))))
        at += len(word)
    return shown


def _visible(text: str, at: int) -> str:
    character = text[at]
    if character == "\n":
        return f"{LINE}\n"
    if character == "\t":
        return TAB
    if character == " ":
        beside = (text[at - 1] if at else "\n", text[at + 1] if at + 1 < len(text) else "\n")
        return SPACE if set(beside) & {" ", "\n"} else " "
    if character.isprintable() and character not in MARKS:
        return character
    return character.encode("unicode_escape").decode()
