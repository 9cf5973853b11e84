"""A pair as text: what is scored is marked, special tokens are seen, and the pieces make the whole."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import save_tokenizer

from dspref.data.show import COLOUR, WORTH_LEAVING_OUT, mark, shown, texts
from dspref.data.tokenize import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return load_tokenizer(str(folder))


def pair(tokenizer, prompt: str, chosen: str, rejected: str, **masks):
    ids = {name: np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32) for name, text in
           (("prompt", prompt), ("chosen", chosen), ("rejected", rejected))}  # fmt: skip
    return SimpleNamespace(**ids, **masks)


def test_answers_without_a_mask_are_scored_whole(tokenizer) -> None:
    lines = mark(pair(tokenizer, "Hi", "yes", "no"), tokenizer).splitlines()
    assert lines == ["prompt    Hi", "chosen    [[yes]]", "rejected  [[no]]"]


def test_runs_of_scored_tokens_are_marked(tokenizer) -> None:
    ids = np.asarray(tokenizer("abcdef", add_special_tokens=False)["input_ids"])
    pieces = texts(ids.tolist(), tokenizer)
    assert "".join(pieces) == "abcdef"
    mask = np.zeros(len(ids), dtype=bool)
    mask[0] = mask[-1] = True
    middle = "".join(pieces[1:-1])
    assert shown(ids, mask, tokenizer, 99, colour=False) == f"[[{pieces[0]}]]{middle}[[{pieces[-1]}]]"
    green, end = COLOUR
    assert shown(ids, mask, tokenizer, 99, colour=True) == f"{green}{pieces[0]}{end}{middle}{green}{pieces[-1]}{end}"
    assert shown(ids, ~mask, tokenizer, 99, colour=False) == f"{pieces[0]}[[{middle}]]{pieces[-1]}"


def test_the_masks_of_a_pair_are_used(tokenizer) -> None:
    made = pair(tokenizer, "Hi", "yes", "no")
    made.chosen_scored, made.rejected_scored = np.zeros(len(made.chosen), dtype=bool), None
    assert "[[" not in mark(made, tokenizer).splitlines()[1] and "[[no]]" in mark(made, tokenizer)


def test_of_a_single_answer_there_are_two_lines(tokenizer) -> None:
    lines = mark(pair(tokenizer, "Hi", "", "no"), tokenizer).splitlines()
    assert [line.split()[0] for line in lines] == ["prompt", "rejected"] and lines[1].endswith("[[no]]")


def test_a_long_text_loses_its_middle_and_says_how_much(tokenizer) -> None:
    ids = np.asarray(tokenizer("x y " * 200, add_special_tokens=False)["input_ids"])
    line = shown(ids, np.ones(len(ids), dtype=bool), tokenizer, 20, colour=False)
    assert f" ... {len(ids) - 20} tokens ... " in line and line.count("[[") == line.count("]]") == 2
    assert len(line) < 150
    nearly = shown(ids[: 20 + WORTH_LEAVING_OUT], np.ones(99, dtype=bool), tokenizer, 20, colour=False)
    assert " tokens " not in nearly, "the words for it are longer"


def test_no_control_character_reaches_a_terminal(tokenizer) -> None:
    text = "a\x1b[31mred\x07\nb\tc\u202ed"
    line = shown(np.asarray(tokenizer(text)["input_ids"]), np.zeros(99, dtype=bool), tokenizer, 99, colour=False)
    assert line.isprintable() and "\\n" in line


def test_the_pieces_of_real_texts_make_the_whole(shared: Path) -> None:
    """Letters of several tokens, emoji, special tokens, and texts longer than the window of the decoder."""
    tokenizer = load_tokenizer(str(shared / "tokenizer" / "gpt2-chatml"))
    for text in ("<|im_start|>user\nGrüße, 你好 🤗🤗!<|im_end|>\n", "naïve café — “quoted” " * 40, " leading", "一" * 100):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert "".join(texts(ids, tokenizer)) == text.replace("\n", "\\n")
