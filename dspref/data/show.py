"""A tokenized pair as text for people: special tokens visible, scored tokens marked, long texts shortened in the middle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens that are shown of a prompt and of an answer, of each half from its end.
PROMPT_TOKENS, ANSWER_TOKENS = 60, 120
# Around scored tokens: on a terminal green, elsewhere brackets.
COLOUR, PLAIN = ("\x1b[32m", "\x1b[0m"), ("[[", "]]")
SHOWN_AS = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def mark(pair: Any, tokenizer: PreTrainedTokenizerBase, colour: bool = False) -> str:
    """Three lines, for the prompt, the chosen and the rejected answer of a `TokenizedPair`.

    Answers without a mask of scored tokens are scored whole.
    """
    lines = {"prompt": shown(pair.prompt, np.zeros(len(pair.prompt), dtype=bool), tokenizer, PROMPT_TOKENS, colour)}
    for side in ("chosen", "rejected"):
        ids, scored = getattr(pair, side), getattr(pair, f"{side}_scored", None)
        mask = np.ones(len(ids), dtype=bool) if scored is None else np.asarray(scored, dtype=bool)
        lines[side] = shown(ids, mask, tokenizer, ANSWER_TOKENS, colour)
    return "\n".join(f"{name:<8}  {text}" for name, text in lines.items())


def shown(ids: Sequence[int] | np.ndarray, scored: np.ndarray, tokenizer: Any, limit: int, colour: bool) -> str:
    """One line: the text of the tokens, runs of scored ones between marks."""
    pieces = texts(np.asarray(ids).tolist(), tokenizer)
    head, tail = (range(limit // 2), range(len(pieces) - limit // 2, len(pieces)))
    left_out = len(pieces) - limit
    kept = [*head, None, *tail] if left_out > 0 else [*range(len(pieces))]
    before, after = COLOUR if colour else PLAIN
    line, inside = [], False
    for k in kept:
        within = bool(scored[k]) if k is not None else False
        if within != inside:
            line.append(before if within else after)
        inside = within
        line.append(f" ... {left_out} tokens ... " if k is None else pieces[k])
    return "".join(line) + (after if inside else "")


def texts(ids: list[int], tokenizer: Any) -> list[str]:
    """The text that each token adds to those before it; of a letter made of several tokens, the last has it all."""
    pieces, done = [], 0
    for end, whole in enumerate(_growing(ids, tokenizer), start=1):
        if whole.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            pieces.append("")
            continue
        pieces.append(plain(whole[done:]))
        done = len(whole)
    return pieces


def _growing(ids: list[int], tokenizer: Any) -> Iterator[str]:
    """The text of the first token, the first two, ..., from a window that is moved on: decoding all anew is slow."""
    text, start = "", 0
    for end in range(1, len(ids) + 1):
        window = _decode(tokenizer, ids[start:end])
        yield text + window
        if end - start >= 32 and not window.endswith("\N{REPLACEMENT CHARACTER}"):
            # A token may be read otherwise at the start of a text, so the new window begins with one that is known.
            text, start = text + window[: len(window) - len(_decode(tokenizer, ids[end - 1 : end]))], end - 1


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def plain(text: str) -> str:
    """One line of text without control characters, which a terminal would obey."""
    return "".join(SHOWN_AS.get(c, c if c.isprintable() else "\N{REPLACEMENT CHARACTER}") for c in text)
