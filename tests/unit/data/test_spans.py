"""A pair cut into runs for people to look at: nothing is lost, nothing is ambiguous, nothing drives a terminal; and its row,
read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import save_tokenizer

from dspref.data.formats import RowError
from dspref.data.origin import Again, Origin, origin_of, rows_at, why_left_out
from dspref.data.show import WORTH_LEAVING_OUT, pieces
from dspref.data.sources import Source, find
from dspref.data.spans import CUT, LINE, MARKS, OPEN, SPACE, TAB, sections, special_ids, visible
from dspref.data.store import load_pairs
from dspref.data.tokenize import load_tokenizer, tokenize_pairs
from dspref.data.truncate import Limits, gap, truncate


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain words", "plain words"),
        (" a  b ", f"{SPACE}a{SPACE}{SPACE}b{SPACE}"),
        ("a\n b \n", f"a{LINE}\n{SPACE}b{SPACE}{LINE}\n"),
        ("\ta", f"{TAB}a"),
        ("a\r\nb", f"a\\r{LINE}\nb"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("a\u202eb\u200dc\xa0d", "a\\u202eb\\u200dc\\xa0d"),
        (f"{OPEN}x{CUT}", "\\u27e6x\\u2702"),
        ("你好 🤗", "你好 🤗"),
        ("", ""),
    ],
)
def test_what_would_not_be_seen_is_seen(text: str, shown: str) -> None:
    for size in (1, 2, 99):  # however a text is cut into tokens
        words = [text[k : k + size] for k in range(0, len(text), size)]
        assert "".join(visible(words)) == shown
    assert all(c.isprintable() or c == "\n" for c in shown)


def test_every_character_that_a_terminal_obeys_is_an_escape() -> None:
    for number in [
        *range(0x20),
        *range(0x7F, 0xA1),
        0x200B,
        0x200E,
        0x202A,
        0x2028,
        0x2066,
        0xFEFF,
        0xE0001,
        *map(ord, MARKS),
    ]:
        shown = "".join(visible([chr(number)]))
        assert shown in (f"{LINE}\n", TAB, SPACE) or (shown.startswith("\\") and shown.isascii()), number


def test_the_runs_of_real_pairs_make_the_whole(shared: Path) -> None:
    """Texts, ids, scored and special tokens, over all runs, are those of the pair."""
    tokenizer = load_tokenizer(str(shared / "tokenizer" / "gpt2-chatml"))
    with open(shared / "data" / "multiturn_train.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(4))]
    special = special_ids(tokenizer)
    for pair in tokenize_pairs(rows, tokenizer):
        for section, ids in zip(sections(pair, tokenizer), pair[:3]):
            own = [number for run in section.runs for number in run.ids]
            assert own == ids.tolist() and section.tokens == len(own)
            text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            assert "".join(run.text for run in section.runs) == text
            assert all((number in special) is run.special for run in section.runs for number in run.ids)
            marked = [run.scored for run in section.runs for _ in run.ids]
            mask = np.zeros(len(ids), bool) if section.name == "prompt" else getattr(pair, f"{section.name}_scored")
            assert marked == (np.ones(len(ids), bool) if mask is None else mask).tolist()
            assert section.scored == sum(marked)


def test_a_long_text_is_shown_at_both_ends_and_says_what_is_left_out(tokenizer: Any) -> None:
    pair = tokenize_pairs([{"prompt": "word " * 90, "chosen": " a", "rejected": " b"}], tokenizer)[0]
    prompt = sections(pair, tokenizer, limits=(10, 10, 10))[0]
    assert [run.left_out for run in prompt.runs] == [0, len(pair.prompt) - 10, 0]
    assert prompt.runs[0].ids == pair.prompt[:5].tolist() and prompt.runs[2].ids == pair.prompt[-5:].tolist()
    size = len(pair.prompt)
    nearly = sections(pair, tokenizer, limits=(size - WORTH_LEAVING_OUT, 10, 10))[0]
    assert [run.left_out for run in nearly.runs] == [0], "the words for it are longer"


@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
@pytest.mark.parametrize(
    "limits", [{"max_length": 20}, {"max_prompt_length": 12, "max_length": 16}, {"max_completion_length": 3}]
)
def test_the_place_of_a_cut_is_where_tokens_are_missing(mode: str, limits: dict[str, int], tokenizer: Any) -> None:
    whole = tokenize_pairs(
        [{"prompt": "abcdefghij klmnop qrstuv", "chosen": " yes it is", "rejected": " no it is not"}], tokenizer
    )[0]
    how = Limits(truncation_mode=mode, **limits)
    for head in (0, 3, 50):
        pair = truncate(whole, how, head)
        at, lost = gap(len(pair.prompt), mode, head), len(whole.prompt) - len(pair.prompt)
        if lost:
            assert np.array_equal(np.delete(whole.prompt, range(at, at + lost)), pair.prompt)
        uncut = [len(part) for part in whole[:3]]
        for section, before, after in zip(sections(pair, tokenizer, uncut, at), whole[:3], pair[:3]):
            assert section.lost == len(before) - len(after)
            assert section.gap == ((at if section.name == "prompt" else len(after)) if section.lost else None)


def test_text_is_decoded_in_linear_time(tokenizer: Any) -> None:
    """By counting what is decoded: a token is looked at a bounded number of times, however long the text."""
    decoded = []

    class Counting:
        def decode(self, ids: list[int], **how: Any) -> str:
            decoded.append(len(ids))
            return tokenizer.decode(ids, **how)

    ids = tokenizer("some words and more " * 100, add_special_tokens=False)["input_ids"]
    assert "".join(pieces(ids, Counting())) == "some words and more " * 100
    assert max(decoded) <= 40 and len(decoded) <= 2 * len(ids)


ROWS = [
    {"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi you", "system": "Be kind."},  # the source repeats its prompts
    {"prompt": "Hi", "chosen": "Hi again", "rejected": "Hi, no"},
    {"prompt": "Ho", "chosen": "Ho ho", "rejected": "Ho, ha", "system": None, "score": 3},
    {"prompt": "x", "completions": [" good", " fair", " bad"], "scores": [3, 2, 1]},
    {"prompt": "x", "chosen": "", "rejected": "no"},
]


def test_a_row_is_read_again_as_it_was(shared: Path, tmp_path: Path) -> None:
    """Alone, though what it is hangs on the others of its source."""
    tokenizer = load_tokenizer(str(shared / "tokenizer" / "gpt2-chatml"))
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS[:3]))
    listing, limits = find(Source(str(path))), Limits(max_length=18)
    how: Any = {"on_bad_row": "drop", "cache_dir": tmp_path / "cache", "log": lambda line: None}
    store = load_pairs([listing], tokenizer, limits, **how)
    decided = store.report["sources"][0]["decided"]
    assert decided["repeated"] is True
    for index in reversed(range(3)):
        place = store.place(index)
        assert place == (0, 2 * index + 1)
        row = rows_at(listing, [place])[place]
        made = Again(listing, tokenizer, "assistant", decided)(row)
        origin = origin_of(store[index], made, limits)
        assert origin is not None and origin.values == ROWS[index]
        assert [len(part) for part in origin.whole.pair[:3]] == store.uncut[index].tolist()
        assert origin.preference.chosen[-1]["content"].strip() == ROWS[index]["chosen"][2:].strip(), "without the prompt"
    assert rows_at(listing, [(0, 2), (0, 99)]) == {}


def test_each_pair_of_a_row_is_found_and_what_is_left_out_has_its_reason(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS[3:], {"prompt": "y"}]))
    listing, limits = find(Source(str(path))), Limits()
    how: Any = {"on_bad_row": "drop", "cache_dir": tmp_path / "cache", "log": lambda line: None}
    store = load_pairs([listing], tokenizer, limits, **how)
    assert store.at(0, 1).tolist() == [0, 1, 2] and store.at(0, 2).tolist() == []
    again, rows = (
        Again(listing, tokenizer, "assistant", store.report["sources"][0]["decided"]),
        rows_at(listing, [(0, 1), (0, 2)]),
    )
    origins = [origin_of(store[index], again(rows[0, 1]), limits) for index in range(3)]
    said = [(o.preference.chosen, o.preference.rejected) for o in origins if isinstance(o, Origin)]
    assert said == [(" good", " fair"), (" good", " bad"), (" fair", " bad")]
    (reason,) = why_left_out(again(rows[0, 2]), limits)
    assert isinstance(reason, RowError) and "empty answer" in reason.reason
    assert not why_left_out(again(rows[0, 1]), limits)
    assert len(why_left_out(again(rows[0, 1]), Limits(max_length=2, on_overlong="drop"))) == 3
    assert origin_of(store[0], again(rows[0, 2]), limits) is None
