"""Conversations, and a tokenizer under which their tokens can be counted by hand."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = (
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|eom_id|>",
    ),
    *("<|python_tag|>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "<User>", "<Assistant>", "<eos>"),
)


def characters(template: str, eos: str = "<eos>", merges: tuple[tuple[str, str], ...] = ()) -> PreTrainedTokenizerFast:
    """A token per character, one for each special token and tag, and those that are merged."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, [*merges]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tags = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
    backend.add_tokens([AddedToken(token, normalized=False) for token in tags])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, chat_template=template)


# The one tool that is offered.
ADD = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def said(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def user(content: str) -> dict[str, Any]:
    return said("user", content)


def model(content: str, **more: Any) -> dict[str, Any]:
    return said("assistant", content, **more)


def calls(name: str, **arguments: Any) -> dict[str, Any]:
    return model("", tool_calls=[{"type": "function", "function": {"name": name, "arguments": arguments}}])


def runs(tokenizer: PreTrainedTokenizerFast, ids: Any, mask: Any) -> list[tuple[bool, str, int]]:
    """An answer in runs of tokens: whether they are scored, their text, and how many they are."""
    scored = [True] * len(ids) if mask is None else mask.tolist()
    grouped = groupby(zip(scored, ids.tolist(), strict=True), key=lambda pair: pair[0])
    tokens = [(own, [token for _, token in run]) for own, run in grouped]
    return [(own, str(tokenizer.decode(run)), len(run)) for own, run in tokens]


def parts(tokenizer: PreTrainedTokenizerFast, ids: Any, mask: Any) -> list[str]:
    """The text of an answer in runs, those that are scored in brackets."""
    return [f"[[{text}]]" if scored else text for scored, text, _ in runs(tokenizer, ids, mask)]
