"""Token ids of a pair, cut to the limits of a run; and the type of such a pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dspref.data.formats import RowError


class TokenizedPair(NamedTuple):
    """Token ids, int32 `[n]` each, and which tokens of the answers are scored, bool `[n]`; None: all of them.

    The prompt is shared and has at least one token. The last token of an answer is scored. Of unpaired data one answer is
    there, chosen if it is desirable and else rejected, and the other has no token.
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    chosen_scored: np.ndarray | None = None
    rejected_scored: np.ndarray | None = None


@dataclass(frozen=True)
class Limits:
    """Token limits, None for none. `truncation_mode`: keep_end | keep_start, of the prompt. `on_overlong`: what to do with a
    pair beyond them: truncate | drop | error."""

    max_length: int | None = None
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    truncation_mode: str = "keep_end"
    min_prompt_length: int | None = None
    """What is left of a prompt before answers are cut; None: a quarter of max_length."""
    on_overlong: str = "truncate"


def in_force(limits: Limits) -> str:
    """The limits that are set, in words."""
    names = ("max_length", "max_prompt_length", "max_completion_length")
    return ", ".join(f"{name} {getattr(limits, name)}" for name in names if getattr(limits, name) is not None)


def truncate(pair: TokenizedPair, limits: Limits, head: int = 0, tail: int = 0, beside: int = 0) -> TokenizedPair:
    """Cut a pair to the limits; both sides keep the same prompt, and answers lose their end. `beside`: tokens of the longest
    answer that has the same prompt, and is in another pair.

    The prompt is cut to max_prompt_length and the answers to max_completion_length. Where prompt and longer answer are still
    beyond max_length, the prompt shrinks, but not below min_prompt_length, and then the answers. The first `head` tokens
    of the prompt, which the template puts before any content, survive `keep_end`, and the last `tail` ones `keep_start`.

    Raises RowError when a side keeps no scored token, or (droppable) when both sides become equal, or where overlong pairs
    are to be dropped.
    """
    prompt, chosen, rejected = pair[:3]
    if limits.max_prompt_length is not None:
        prompt = _kept(prompt, limits.max_prompt_length, limits.truncation_mode, head, tail)
    if limits.max_completion_length is not None:
        chosen, rejected = chosen[: limits.max_completion_length], rejected[: limits.max_completion_length]
        beside = min(beside, limits.max_completion_length)
    longest = max(len(chosen), len(rejected), beside)
    if limits.max_length is not None and len(prompt) + longest > limits.max_length:
        room = limits.max_length - longest
        least = limits.max_length // 4 if limits.min_prompt_length is None else limits.min_prompt_length
        prompt = _kept(prompt, max(room, least), limits.truncation_mode, head, tail)
        room = max(0, limits.max_length - len(prompt))
        chosen, rejected = chosen[:room], rejected[:room]
    (chosen, chosen_scored), (rejected, rejected_scored) = (
        _cut(chosen, pair.chosen_scored),
        _cut(rejected, pair.rejected_scored),
    )
    cut = TokenizedPair(prompt, chosen, rejected, chosen_scored, rejected_scored)
    fault = _fault_of(pair, cut, _raise(pair, limits))
    shorter = any(len(after) < len(before) for before, after in zip(pair[:3], cut[:3]))
    if shorter and limits.on_overlong != "truncate":
        raise _overlong(pair, limits, may_be_cut=fault is None)
    if fault is not None:
        raise fault
    return cut


def labelled(pair: TokenizedPair, label: bool | None) -> TokenizedPair:
    """Of a pair that is one answer twice, the one that its label says; of another, itself."""
    if label is None:
        return pair
    missing = "rejected" if label else "chosen"
    return pair._replace(**{missing: pair.prompt[:0], f"{missing}_scored": None})


def refuse_cut_images(images: np.ndarray, kept: int, limits: Limits, head: int) -> None:
    """Raise RowError where a prompt that was cut to `kept` tokens lost some of `images`, bool [n] (droppable, where
    overlong pairs are to be dropped)."""
    lost = len(images) - kept
    start = gap(kept, limits.truncation_mode, head)
    if lost and images[start : start + lost].any():
        cuts = "data.max_prompt_length" if limits.max_prompt_length is not None else "set data.max_completion_length"
        fix = f"raise data.max_length or {cuts}, or set data.on_overlong: drop"
        reason = "longer than the limits, and what would be cut has tokens of an image"
        raise RowError("images", reason, fix, droppable=limits.on_overlong == "drop")


def _fault_of(pair: TokenizedPair, cut: TokenizedPair, fix: str) -> RowError | None:
    """Why a pair that was cut cannot be used."""
    for field, answer, whole in (("chosen", cut.chosen, pair.chosen), ("rejected", cut.rejected, pair.rejected)):
        if len(answer) == 0 < len(whole):
            field = field if len(pair.chosen) and len(pair.rejected) else "completion"
            return RowError(field, "no scored token is left after truncation", fix)
    if np.array_equal(cut.chosen, cut.rejected):
        return RowError("rejected", "identical to chosen after truncation", fix, droppable=True)
    return None


def _exceeded(pair: TokenizedPair, limits: Limits) -> list[str]:
    """The limits that a pair is beyond."""
    prompt, answer = len(pair.prompt), max(len(pair.chosen), len(pair.rejected))
    sizes = {"max_length": prompt + answer, "max_prompt_length": prompt, "max_completion_length": answer}
    asked = {name: getattr(limits, name) for name in sizes}
    return [name for name, value in asked.items() if value is not None and sizes[name] > value]


def _raise(pair: TokenizedPair, limits: Limits) -> str:
    return f"raise {' and '.join(f'data.{name}' for name in _exceeded(pair, limits))}"


def _overlong(pair: TokenizedPair, limits: Limits, may_be_cut: bool) -> RowError:
    """The error of a pair beyond the limits; without its length, so that equal reasons are counted together. `may_be_cut`:
    what truncation would leave of it can be used."""
    beyond = ", ".join(f"{name} {getattr(limits, name)}" for name in _exceeded(pair, limits))
    others = ["truncate"] * may_be_cut + ["drop"] * (limits.on_overlong == "error")
    fix = _raise(pair, limits) + (f", or set data.on_overlong: {' or '.join(others)}" if others else "")
    return RowError("pair", f"longer than {beyond}", fix, droppable=limits.on_overlong == "drop")


def _kept(prompt: np.ndarray, size: int, truncation_mode: str, head: int, tail: int) -> np.ndarray:
    size = max(1, size)
    if len(prompt) <= size:
        return prompt
    head = gap(size, truncation_mode, head, tail)
    return np.concatenate([prompt[:head], prompt[len(prompt) - size + head :]])


def gap(size: int, truncation_mode: str, head: int, tail: int = 0) -> int:
    """How many of the `size` tokens that are left of a prompt stand before those that it lost."""
    # A long opening must leave room for what follows it, and an ending for what precedes it.
    return size - min(tail, size // 2) if truncation_mode == "keep_start" else min(head, size // 2)


def _cut(answer: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """The head of an answer up to its last scored token, and its mask."""
    return (answer, None) if mask is None else written(answer, mask[: len(answer)])


def written(answer: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """An answer up to its last scored token, as nothing behind that matters, and its mask; None where all is scored."""
    end = len(mask) - int(mask[::-1].argmax()) if mask.any() else 0
    return answer[:end], None if mask[:end].all() else mask[:end]
