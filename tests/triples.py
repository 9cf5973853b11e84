"""Rows of TPO, a pair and a gold answer each, out of real pairs; the fixture of TRL and its test share them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def triple_rows(pairs: Sequence[dict[str, Any]], numbers: str, kind: str) -> list[dict[str, Any]]:
    """Of conversational pairs of the same prompt: `3,17` is the fourth with the chosen answer of the eighteenth as its gold
    one. As `chat`, or as `text`: the question and its answers as strings that meet at a space."""
    rows = []
    for named in numbers.split():
        pair, other = (pairs[int(number)] for number in named.split(","))
        assert pair["prompt"] == other["prompt"]
        answers = {"reference": other["chosen"], "chosen": pair["chosen"], "rejected": pair["rejected"]}
        rows.append({"prompt": pair["prompt"]} | answers if kind == "chat" else _as_text(pair["prompt"], answers))
    return rows


def _as_text(prompt: list[dict[str, str]], answers: dict[str, list[dict[str, str]]]) -> dict[str, str]:
    (asked,) = prompt
    said = {name: f" {message['content']}" for name, (message,) in answers.items()}
    return {"prompt": f"Question: {asked['content']}\nAnswer:"} | said
