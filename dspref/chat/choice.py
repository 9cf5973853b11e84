"""Which of two answers is better: a key is asked for, and the choice kept as a preference row."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dspref.chat.speaker import Messages
from dspref.data.image_rows import as_rows_have
from dspref.files import append_line

KEYS = {"1": 0, "2": 1, "s": None}


def pressed(question: str, keys: Sequence[str]) -> str | None:
    """The first of these keys that is pressed on the terminal after a question; None for Ctrl-D, or where that has gone."""
    import termios
    import tty

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    try:
        tty.setcbreak(terminal, termios.TCSANOW)  # by default it would drop a key that came before
        print(question, end="", flush=True)
        while (key := os.read(terminal, 1)) not in (b"", b"\x04"):
            if (name := key.decode("ascii", "ignore").lower()) in keys:
                return name
        return None
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def row_of(messages: Messages, chosen: str, rejected: str, converses: bool) -> dict[str, object]:
    """A preference row as dspref reads it: a conversation and two answers, or texts."""
    if not converses:
        return {"prompt": messages[-1]["content"], "chosen": chosen, "rejected": rejected}
    answers = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    return {"prompt": as_rows_have(messages), "chosen": answers[0], "rejected": answers[1]}


def refusal(answers: Sequence[str]) -> str | None:
    """Why two answers make no preference row."""
    if not all(answer.strip() for answer in answers):
        return "an answer is empty"
    return "both answers are the same" if answers[0] == answers[1] else None


def keep(file: Path, row: dict[str, object]) -> None:
    append_line(file, json.dumps(row))
