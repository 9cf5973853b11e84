"""Rows of KTO and BCO, one answer and its label each, out of real pairs; the fixtures of TRL and their test share them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def unpaired_rows(pairs: Sequence[dict[str, Any]], order: str, kind: str) -> list[dict[str, Any]]:
    """Answers of conversational pairs: `0+ 2-` is the chosen one of the first and the rejected one of the third. As `chat`,
    or as `text`: the question and its answer as strings that meet at a space."""
    return [_row(pairs[int(answer[:-1])], answer.endswith("+"), kind) for answer in order.split()]


def _row(pair: dict[str, Any], label: bool, kind: str) -> dict[str, Any]:
    prompt, completion = pair["prompt"], pair["chosen" if label else "rejected"]
    if kind == "text":
        (asked,), (answered,) = prompt, completion
        prompt, completion = f"Question: {asked['content']}\nAnswer:", f" {answered['content']}"
    return {"prompt": prompt, "completion": completion, "label": label}
