"""Where an answer begins in texts: behind what two answers share, or behind a prompt that they repeat."""

from __future__ import annotations

import re
from os.path import commonprefix

# HH-RLHF: where the assistant begins to speak, if possible at the start of a line.
ASSISTANT_SPEAKS = (re.compile(r"(?:^|\n)[ \t]*(Assistant|ASSISTANT):"), re.compile(r"(?<!\w)(Assistant|ASSISTANT):"))
# Scripts that put no space between words: CJK signs and kana, not Hangul.
UNSPACED = re.compile("[\u2e80-\u312f\u3190-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]")


def shared_start(left: str, right: str) -> int:
    """Length of the prompt that two texts share: up to the last `Assistant:` that both have, else in whole words, less one
    space at its end; 0 for none. A text that is the start of the other keeps its last word."""
    common = len(commonprefix([left, right]))
    for speaks in ASSISTANT_SPEAKS:
        if marks := list(speaks.finditer(left, 0, common)):
            return marks[-1].end()
    end = _whole_words(left, right, common)
    end -= end > 0 and left[end - 1] == " "
    if end in (len(left), len(right)):
        end = _word_start(left, end)
        end -= end > 0 and left[end - 1] == " "
    return end if left[:end].strip() else 0


def _whole_words(left: str, right: str, end: int) -> int:
    """The end of the last word of `left[:end]` that does not go on in one of the texts."""
    cut = end > 0 and any(_goes_on(text[end - 1 : end + 1]) for text in (left, right))
    return _word_start(left, end) if cut else end


def _goes_on(two: str) -> bool:
    """Whether two neighbouring characters belong to one word, with the punctuation at it."""
    return len(two) == 2 and not any(character.isspace() or UNSPACED.match(character) for character in two)


def _word_start(text: str, end: int) -> int:
    """Where the last word of `text[:end]` starts."""
    if end > 0 and UNSPACED.match(text[end - 1]):
        return end - 1
    while end > 0 and _goes_on(text[end - 1] + "x"):
        end -= 1
    return end


def behind_text(prompt: str, chosen: str, rejected: str) -> tuple[str, str, str] | None:
    """(prompt, chosen, rejected) of two answers that both begin with the prompt, up to white space, or with its last
    line, if that ends with a colon; None where they do not. Texts are joined as they are, so no repeat is meant.

    One answer that alone does so is left as it is: it may be what was wrong with it, and the start of the other shows that
    the prompt does not stand there by the layout."""
    line = prompt.rstrip().rpartition("\n")[2].strip()
    for repeated in (prompt, *([line] if line.endswith(":") else [])):
        if not repeated.strip():
            continue
        if all(answer.startswith(repeated) and not _in_word(answer, len(repeated)) for answer in (chosen, rejected)):
            kept = prompt if repeated is prompt else prompt.rstrip()  # the space behind the line is the answers'
            return kept, chosen[len(repeated) :], rejected[len(repeated) :]
        ends = [_end_of_repeat(repeated, answer) for answer in (chosen, rejected)]
        if ends[0] is not None and ends[1] is not None:
            return prompt.rstrip(), chosen[ends[0] :], rejected[ends[1] :]
    return None


def _end_of_repeat(prompt: str, answer: str) -> int | None:
    """Where an answer's repeat of the prompt ends, other white space allowed; None where it has none."""
    words = prompt.split()
    start = len(answer) - len(answer.lstrip())
    if not answer.startswith(words[0], start):
        return None
    end = start + len(prompt.strip())
    if answer.startswith(prompt.strip(), start):
        return None if _in_word(answer, end) else end
    parts = answer.split(None, len(words))
    if parts[: len(words)] != words:
        return None
    rest = parts[len(words)] if len(parts) > len(words) else ""
    return len(answer[: len(answer) - len(rest)].rstrip())


def _in_word(text: str, end: int) -> bool:
    return _goes_on(text[end - 1 : end + 1]) and text[end - 1].isalnum() and text[end].isalnum()
