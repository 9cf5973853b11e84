"""Where an answer begins in texts: behind what two answers share, or behind a prompt that they repeat."""

from __future__ import annotations

import re
from collections.abc import Iterator
from os.path import commonprefix

# Where the assistant begins to speak, in texts that hold a conversation: tokens of chat formats with all of their header,
TOKENS = re.compile(
    r"<\|im_start\|>assistant\n|<\|start_header_id\|>assistant<\|end_header_id\|>(?:\n\n)?|<start_of_turn>model\n"
    r"|<\|start\|>assistant(?:<\|channel\|>\w+)?<\|message\|>|\[/INST\]|<\|CHATBOT_TOKEN\|>"
    r"|<(?P<bar>[|\uff5c])(?:assistant|bot|gpt|model)(?P=bar)>|<assistant>",
    re.I,
)
# and labels at the start of a line, of HH-RLHF, Alpaca, summaries and others,
LABELS = re.compile(
    r"(?:^|\n)[ \t]*(?:#+ *(?:response|assistant)\b:?|(?:\*\*)?(?:assistant|ai|gpt|chatgpt|tl;dr)(?:\*\*)?:(?:\*\*)?)", re.I
)
# some of them where the other side has one too, as they may mean other things;
OF_PAIRS = (
    (re.compile(r"(?:^|\n)[ \t]*[QH]:"), re.compile(r"(?:^|\n)[ \t]*A:")),
    (
        re.compile(r"(?:^|\n)[ \t]*(?:#+ *)?(?:human|user|question|instruction|input|query|prompt|customer)\b *:", re.I),
        re.compile(r"(?:^|\n)[ \t]*(?:#+ *)?(?:answer|response|output|bot|chatbot|model|agent|claude|llm)\b *:", re.I),
    ),
)
# and where no line begins so, within one (Vicuna).
WITHIN = (
    (None, re.compile(r"(?<!\w)(?:Assistant|ASSISTANT):")),
    (
        re.compile(r"(?<!\w)(?:Human|HUMAN|User|USER):"),
        re.compile(r"(?<!\w)(?:AI|GPT|ChatGPT|Bot|BOT):"),
    ),
)
LINES = ((None, TOKENS), (None, LABELS), *OF_PAIRS)
# Scripts that put no space between words: CJK signs and kana, not Hangul.
UNSPACED = re.compile("[\u2e80-\u312f\u3190-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]")


def shared_start(left: str, right: str) -> int:
    """Length of the prompt that two texts share: up to the last place where both have the assistant begin to speak, else in
    whole words, less one space at its end; 0 for none. A text that is the start of the other keeps its last word."""
    common = len(commonprefix([left, right]))
    if spoken := _speech_begins(left, right, common):
        return spoken
    end = _whole_words(left, right, common)
    end -= end > 0 and left[end - 1] == " "
    if end in (len(left), len(right)):
        end = _word_start(left, end)
        end -= end > 0 and left[end - 1] == " "
    return end if left[:end].strip() else 0


def _speech_begins(left: str, right: str, common: int) -> int:
    """Where, within what two texts share, the assistant begins to speak for the last time in both; 0 for nowhere."""
    for patterns in (LINES, WITHIN):
        both = [{end for other, own in patterns for end in _ends(text, common, other, own)} for text in (left, right)]
        if ends := both[0] & both[1]:
            return max(ends)
    return 0


def _ends(text: str, common: int, other: re.Pattern[str] | None, own: re.Pattern[str]) -> Iterator[int]:
    """Where matches of `own` end; with `other`, of those behind its first match."""
    first = other.search(text) if other is not None else None
    if other is None or first:
        found = own.finditer(text, max(first.end() - 1, 0) if first else 0)
        yield from (match.end() for match in found if match.end() <= common)


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


def begun_anew(text: str) -> str:
    """What stands behind a repeated prompt, as a turn of its own: without the space that parted them, or the end of the line
    and blank lines, but with the indent of its own first line."""
    return text[blank.end() :] if (blank := re.match(r"\s*\n", text)) else text.lstrip()


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
