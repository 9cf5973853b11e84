"""Which rank answers which prompts, and what is kept of answers."""

from __future__ import annotations

import json

import pytest
import yaml
from tiny import save_tokenizer, write_run
from transformers import AutoTokenizer
from typer.testing import CliRunner

from dspref.cli import app
from dspref.report import console
from dspref.run import samples
from dspref.training.answers import shares, text_of_prompt


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("tokens", [1, 40, 10_000])
def test_every_prompt_is_answered_once_and_ranks_make_as_many_forwards(ranks, tokens):
    lengths = [5, 30, 2, 9, 9, 17, 1]
    found = shares(lengths, ranks, tokens, new=8)
    assert len({len(batches) for batches in found}) == 1
    own = [i for batches in found for batch, counts in batches if counts for i in batch]
    assert sorted(own) == list(range(len(lengths)))
    for batch, _ in (pair for batches in found for pair in batches):
        assert len(batch) == 1 or len(batch) * (max(lengths[i] for i in batch) + 8) <= tokens


@pytest.mark.parametrize(
    ("marks", "template", "text"),
    [
        (["<|h|>", "<|/h|>", "<|eot|>"], "<|h|>{}<|/h|>\n\n{}<|eot|>", "system\n\nBe kind.\nuser\n\nHi\nyou\nassistant\n\n"),
        (["<|im_start|>", "<|im_end|>"], "<|im_start|>{}\n{}<|im_end|>\n", "system\nBe kind.\nuser\nHi\nyou\nassistant\n"),
        (["[INST]", "[/INST]"], "[INST]({}) {}[/INST]", "(system) Be kind.\n(user) Hi\nyou\n(assistant) "),
    ],
)  # fmt: skip
def test_a_prompt_is_read_by_lines_whatever_its_template_puts_between_turns(marks, template, text, tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, extra_special_tokens=marks)
    turns = ("system", "Be kind."), ("user", "Hi\nyou")
    head = template.split("{}")
    prompt = "".join(template.format(*turn) for turn in turns) + f"{head[0]}assistant{head[1]}"
    assert text_of_prompt(tokenizer, tokenizer(prompt)["input_ids"]) == text
    assert console.asked(text) == ("Hi\nyou" if "(user)" not in text else text)


def test_rows_of_steps_that_are_made_again_are_dropped(tmp_path):
    path = tmp_path / "samples.jsonl"
    for step in (0, 2, 4):
        samples.write(path, [{"step": step, "prompt": name, "reference": f"of {name}"} for name in "ab"])
        with open(path, "a") as file:
            file.write('{"step": 4, "prompt": "cut short')  # by a kill: what comes next begins a line of its own
    samples.forget_behind(path, 2)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in rows] == [(0, "a"), (0, "b"), (2, "a"), (2, "b")]
    assert samples.kept_answers(path, ["a", "b"]) == ["of a", "of b"]
    assert samples.kept_answers(path, ["b", "a"]) is None and samples.kept_answers(path, ["a", "b", "a", "b", "a"]) is None
    before = path.stat().st_mtime_ns
    samples.forget_behind(path, 2)
    assert path.stat().st_mtime_ns == before, "written only where something is dropped"
    samples.forget_behind(path, -1)
    assert path.read_text() == "" and samples.kept_answers(path, ["a"]) is None


def test_prompts_of_ones_own_are_looked_at_before_a_run(tmp_path):
    run_file, path = write_run(tmp_path), tmp_path / "own.jsonl"
    values = yaml.safe_load(run_file.read_text())
    run_file.write_text(yaml.safe_dump(values | {"log": {"samples_file": str(path)}}))

    def check():
        result = CliRunner().invoke(app, ["check", "--data", str(run_file)])
        return result.exit_code, result.output

    path.write_text('{"prompt": "What is it?"}\n{"prompt": "x"}\n')
    code, said = check()
    assert code == 0 and "prompts 2\n\n<|im_start|>user\nWhat is it?<|im_end|>" in said
    path.write_text('{"prompt": "x"}\n' + json.dumps({"prompt": "x" * 5000}))
    code, said = check()
    assert (
        code == 3 and f"{path}:2: prompt: 5019 tokens leave no room in the model's 4096 positions; fix: shorten it" in said
    )
