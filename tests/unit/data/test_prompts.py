"""A file of prompts: what a model is asked with is what it would be trained on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tokenizer
from transformers import AutoTokenizer

from dspref.data.prompts import read_prompts
from dspref.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def asked(path: Path, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(prompt.ids) for prompt in read_prompts(path, tokenizer)]


def user(text: str, system: str = "") -> str:
    head = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return f"{head}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_lines_of_text_are_what_a_user_says(tokenizer, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfWhat is\tit?\r\n\n  And why? \n[1] no JSON")
    assert asked(path, tokenizer) == [user("What is\tit?"), user("And why?"), user("[1] no JSON")]
    assert [prompt.where for prompt in read_prompts(path, tokenizer)] == [f"{path}:{line}" for line in (1, 3, 4)]


def test_rows_are_texts_or_conversations(tokenizer, tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    rows = [
        {"prompt": "Hi\nthere", "chosen": "x", "more": 1},
        {"prompt": turns, "chosen": [{"role": "assistant", "content": "y"}]},
        {"prompt": "Hi", "system": "Be kind."},
        {"prompt": [{"from": "human", "value": "sharegpt"}]},
    ]
    path = tmp_path / "prompts.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    talk = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    assert asked(path, tokenizer) == [user("Hi\nthere"), talk + user("c"), user("Hi", "Be kind."), user("sharegpt")]
    assert [prompt.chosen for prompt in read_prompts(path, tokenizer)] == ["x", "y", None, None]


def test_without_a_template_text_stays_text(tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = None
    path = tmp_path / "prompts.txt"
    path.write_text("The sky is\n")
    assert asked(path, tokenizer) == ["The sky is"]


BAD = {
    "name": ("a.jsonl", '{"promt": "x"}\n', ":1: prompt: is missing; fix: rename promt to prompt"),
    "number": (
        "a.jsonl",
        '{"prompt": "x"}\n{"prompt": 3}\n',
        ":2: prompt: is no text, and no list of messages; fix: write a",
    ),
    "blank": ("a.jsonl", '{"prompt": " "}\n', ":1: prompt: is empty; fix: write a text"),
    "no messages": ("a.jsonl", '{"prompt": []}\n', ":1: prompt: is empty"),
    "chosen": ("a.jsonl", '{"prompt": "x", "chosen": 5}\n', ":1: chosen: is no text, and no message with a content"),
    "null": ("a.jsonl", '{"prompt": null}\n', ":1: prompt: is null"),
    "broken": ("a.jsonl", '{"prompt": "x"}\n{"prompt"\n', ":2: "),
    "message": ("a.jsonl", '{"prompt": [{"role": "user"}]}\n', ":1: prompt[0]"),
    "empty": ("a.txt", " \n\n", ": the file holds no prompt; fix: write at least one"),
    "not text": ("a.txt", b"\xff\xfe\x00", "fix: give a text file"),
    "rows by another name": ("a.txt", '{"prompt": "x"}\n', ": its lines are rows of JSON; fix: name it .jsonl"),
    "not there": ("", "", "fix: give a text file"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_prompt_is_one_line(case, tokenizer, tmp_path):
    name, content, said = BAD[case]
    path = tmp_path / (name or "nowhere.txt")
    if name:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        read_prompts(path, tokenizer)
    assert str(error.value).startswith(str(path)) and said in str(error.value) and "\n" not in str(error.value)
    assert "on_bad_row" not in str(error.value)


def test_all_that_is_wrong_is_told_at_once(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": ""}\n{"prompt": "x"}\n{"prompt": 3}\n{"prompt"\n{"prompt": " "}\n')
    with pytest.raises(DataError) as error:
        read_prompts(path, tokenizer)
    empty, number, broken = str(error.value).splitlines()
    assert empty.startswith(f"{path}:1: prompt: is empty (also {path}:5); fix: ") and f"{path}:3: prompt: is no" in number
    assert broken.startswith(f"{path}:4: ")
