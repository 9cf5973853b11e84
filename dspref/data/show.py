"""A tokenized pair as text for people: special tokens visible, scored tokens marked, long texts shortened in the middle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens that are shown of a prompt and of an answer, of each half from its end. A few more are shown too: saying that they
# are left out would take as much room.
PROMPT_TOKENS, ANSWER_TOKENS = 60, 120
WORTH_LEAVING_OUT = 16
# Around scored tokens: on a terminal green, elsewhere brackets.
COLOUR, PLAIN = ("\x1b[32m", "\x1b[0m"), ("[[", "]]")
# Tokens that are decoded together: more than a letter is made of.
WINDOW = 32
SHOWN_AS = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def mark(pair: Any, tokenizer: PreTrainedTokenizerBase, colour: bool = False, chosen: str = "chosen") -> str:
    """Three lines, for the prompt, the chosen and the rejected answer of a `TokenizedPair`; two where it has one answer.
    `chosen`: what the chosen answer is called.

    Answers without a mask of scored tokens are scored whole.
    """
    lines = {"prompt": shown(pair.prompt, np.zeros(len(pair.prompt), dtype=bool), tokenizer, PROMPT_TOKENS, colour)}
    for side in ("chosen", "rejected"):
        ids, scored = getattr(pair, side), getattr(pair, f"{side}_scored", None)
        if not len(ids):  # of unpaired data
            continue
        mask = np.ones(len(ids), dtype=bool) if scored is None else np.asarray(scored, dtype=bool)
        lines[side if side == "rejected" else chosen] = shown(ids, mask, tokenizer, ANSWER_TOKENS, colour)
    width = max(8, len(chosen))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def shown(ids: Sequence[int] | np.ndarray, scored: np.ndarray, tokenizer: Any, limit: int, colour: bool) -> str:
    """One line: the text of the tokens, runs of scored ones between marks."""
    words = texts(np.asarray(ids).tolist(), tokenizer)
    head, tail = (range(limit // 2), range(len(words) - limit // 2, len(words)))
    left_out = len(words) - limit
    kept = [*head, None, *tail] if left_out > WORTH_LEAVING_OUT else [*range(len(words))]
    before, after = COLOUR if colour else PLAIN
    line, inside = [], False
    for k in kept:
        within = bool(scored[k]) if k is not None else False
        if within != inside:
            line.append(before if within else after)
        inside = within
        line.append(f" ... {left_out} tokens ... " if k is None else words[k])
    return "".join(line) + (after if inside else "")


def texts(ids: list[int], tokenizer: Any) -> list[str]:
    """The same in one line, without control characters."""
    return [plain(piece) for piece in pieces(ids, tokenizer)]


def pieces(ids: list[int], tokenizer: Any) -> list[str]:
    """The text that each token adds to those before it; of a letter made of several tokens, the last has it all."""
    # From a window that is moved on: decoding all anew is slow. `done`: characters of it that have been given.
    found, start, done = [], 0, 0
    for end in range(1, len(ids) + 1):
        window = _decode(tokenizer, ids[start:end])
        if window.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            found.append("")
            continue
        found.append(window[done:])
        done = len(window)
        if end - start >= WINDOW and not window.endswith("\N{REPLACEMENT CHARACTER}"):
            # A token may be read otherwise at the start of a text, so the new window begins with one that is known.
            start, done = end - 1, len(_decode(tokenizer, ids[end - 1 : end]))
    return found


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def plain(text: str) -> str:
    """One line of text without control characters, which a terminal would obey."""
    return "".join(SHOWN_AS.get(c, c if c.isprintable() else "\N{REPLACEMENT CHARACTER}") for c in text)
