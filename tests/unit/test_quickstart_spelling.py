"""The encoder-decoder example's data is what its generator writes, its answers are right, and its held-out rows are new."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dspref import config

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "launch" / "quickstart" / "spelling"

_spec = importlib.util.spec_from_file_location("quickstart_spelling_generate", FOLDER / "generate.py")
assert _spec and _spec.loader
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)


def rows(name: str) -> Iterator[tuple[str, str, str]]:
    for line in (FOLDER / name).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield row["letters"], row["good"], row["bad"]


def test_the_committed_files_are_the_generators_output():
    for path, text in generate.files().items():
        assert (FOLDER / path).read_bytes() == text.encode(), f"{path}: run python launch/quickstart/spelling/generate.py"


@pytest.mark.parametrize("name", ["train.jsonl", "eval.jsonl"])
def test_every_good_answer_is_right_and_every_bad_one_wrong(name):
    for letters, good, bad in rows(name):
        # Said here once more: the first letters of the words are the letters.
        assert "".join(word[0] for word in good.split()) == letters
        assert generate.answer(letters) == good != bad


def test_no_held_out_row_is_trained_on():
    train, held_out = ({letters for letters, *_ in rows(name)} for name in ("train.jsonl", "eval.jsonl"))
    assert len(train) >= 2000
    assert len(held_out) == generate.HELD_OUT
    assert not train & held_out


def test_the_tokenizer_has_a_token_for_each_letter_and_word():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "tokenizer")
    asked = tokenizer("Spell qbma")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(asked) == ["Spell ", "q", "b", "m", "a", "</s>"]
    said = tokenizer(text_target="quebec bravo mike alfa")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(said) == ["quebec", " bravo", " mike", " alfa", "</s>"]
    assert tokenizer.decode(said, skip_special_tokens=True) == "quebec bravo mike alfa"


def test_the_config_loads_and_names_these_files(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    example = config.load("launch/configs/quickstart_encoder_decoder.yaml")
    sources = [*example.data.train_sources, *example.data.eval_sources.values()]
    assert [Path(source.path).resolve() for source in sources] == [FOLDER / "train.jsonl", FOLDER / "eval.jsonl"]
