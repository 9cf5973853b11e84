"""The quick start's data is what its generator writes, its answers are right, and its held-out words are new."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspref import config
from dspref.data.tokenize import load_tokenizer

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "launch" / "quickstart"

_spec = importlib.util.spec_from_file_location("quickstart_generate", FOLDER / "generate.py")
assert _spec and _spec.loader
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)


def rows(name: str) -> Iterator[tuple[str, str, str]]:
    for line in (FOLDER / name).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield row["prompt"][0]["content"], row["chosen"][0]["content"], row["rejected"][0]["content"]


def test_the_committed_files_are_the_generators_output():
    for path, text in generate.files().items():
        assert (FOLDER / path).read_bytes() == text.encode(), f"{path}: run python launch/quickstart/generate.py"


@pytest.mark.parametrize("name", ["train.jsonl", "eval.jsonl"])
def test_every_chosen_answer_is_right_and_every_rejected_one_wrong(name):
    for prompt, chosen, rejected in rows(name):
        # Said here once more, so that a generator with a wrong `answer` does not agree with itself.
        word = prompt.split()[1]
        assert prompt == f"Write {word} backwards."
        assert generate.answer(prompt) == "".join(reversed(word)) == chosen != rejected


def test_no_held_out_prompt_is_trained_on():
    train, held_out = ([prompt for prompt, *_ in rows(name)] for name in ("train.jsonl", "eval.jsonl"))
    assert len(train) == len(set(train)) >= 500
    assert len(held_out) == len(set(held_out)) == generate.HELD_OUT
    assert not set(train) & set(held_out)


def test_the_config_loads_and_names_these_files(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    quickstart = config.load("launch/configs/quickstart.yaml")
    sources = [*quickstart.data.train_sources, *quickstart.data.eval_sources.values()]
    assert [Path(source.path).resolve() for source in sources] == [FOLDER / "train.jsonl", FOLDER / "eval.jsonl"]
    assert quickstart.zero_stage == 3 and quickstart.output_dir == "runs/quickstart"


def test_the_tokenizer_spells_words_and_stays_itself_beside_the_model(tmp_path):
    # AutoTokenizer looks at the model's type too: for some (qwen2) it would build another tokenizer from this vocabulary.
    for folder in ("tokenizer", "model"):
        shutil.copytree(FOLDER / folder, tmp_path, dirs_exist_ok=True)
    conversation = [{"role": "user", "content": "Write lamp backwards."}, {"role": "assistant", "content": "pmal"}]
    for folder in (FOLDER / "tokenizer", tmp_path):
        tokenizer = load_tokenizer(str(folder))
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == [
            *("<|user|>", "Write ", *"lamp", " backwards.", "<|end|>"),
            *("<|assistant|>", *"pmal", "<|end|>"),
        ]
        assert tokenizer.decode(ids) == text and ids[-1] == tokenizer.eos_token_id
