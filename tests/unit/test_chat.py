"""`dspref chat`: answers are the model's own, on a terminal and between pipes, and choices become rows to train on."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import save_tiny, save_tokenizer, tiny_config
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dspref.chat import choice, talk
from dspref.chat.sides import Sides
from dspref.chat.speaker import Speaker
from dspref.cli import app
from dspref.data import vocabulary
from dspref.data.sources import Source
from dspref.data.store import load_pairs
from dspref.data.truncate import Limits
from dspref.model.generation import Asked, config_of, stream

USER = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models that answer otherwise; the second has no tokenizer of its own."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("one", 1), ("two", 2)):
        save_tiny(folder / name, tiny_config("llama", 259, eos_token_id=5, max_position_embeddings=200), seed)
    save_tokenizer(folder / "one")
    return [folder / "one", folder / "two"]


def speaker(folder: Path, **asked: object) -> Speaker:
    tokenizer = vocabulary.load_as_written(str(folder))
    return Speaker.load(str(folder), tokenizer, False, Asked(**asked))  # type: ignore[arg-type]


def test_an_answer_is_what_transformers_generates(models: list[Path]) -> None:
    one = speaker(models[0], greedy=True, max_tokens=20)
    ids = one.ids_of(USER)
    assert one.tokenizer.decode(ids) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    plain = AutoModelForCausalLM.from_pretrained(models[0])
    prompt = torch.tensor([ids])
    expected = plain.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    new = expected[0, len(ids) :].tolist()
    assert list(stream(one.lm, ids, one.how)) == new
    assert "".join(one.answer(USER)) == one.tokenizer.decode(new, skip_special_tokens=True)
    assert one.ending == "cut at 20 tokens" or len(new) < 20


def test_options_go_over_the_model_s_generation_config(models: list[Path]) -> None:
    one = speaker(models[0])
    one.lm.generation_config.update(do_sample=True, temperature=0.3, top_p=0.8, max_new_tokens=77, num_beams=4)

    def how(**asked: object) -> tuple[object, ...]:
        made = config_of(one.lm, one.tokenizer, Asked(**asked))  # type: ignore[arg-type]
        assert made.num_beams == 1 and made.eos_token_id == [5, one.tokenizer.eos_token_id]
        return made.do_sample, made.temperature, made.top_p, made.max_new_tokens

    assert how() == (True, 0.3, 0.8, 77)
    assert how(temperature=1.5, max_tokens=5) == (True, 1.5, 0.8, 5)
    assert how(top_p=0.5) == (True, 0.3, 0.5, 77)
    assert how(greedy=True) == how(temperature=0.0) == (False, None, None, 77)
    one.lm.generation_config.do_sample = False
    assert how(top_p=0.5)[0] is True
    assert speaker(models[0]).how.max_new_tokens == 512


def test_an_answer_that_is_left_ends_its_thread(models: list[Path]) -> None:
    import threading

    one = speaker(models[0], greedy=True, max_tokens=150)
    tokens = stream(one.lm, one.ids_of(USER), one.how)
    next(tokens)
    tokens.close()  # type: ignore[attr-defined]
    assert "answer" not in {thread.name for thread in threading.enumerate()}


def test_a_conversation_without_room_says_so(models: list[Path]) -> None:
    one = speaker(models[0], greedy=True)
    assert "".join(one.answer([{"role": "user", "content": "x" * 300}])) == "" and one.ending.startswith("no room")
    assert "".join(one.answer([{"role": "user", "content": "x" * 150}])) is not None


def test_characters_come_whole(models: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    one = speaker(models[0])
    text = "a你é😀b"
    ids = one.tokenizer(text, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr("dspref.model.generation.stream", lambda lm, prompt, how, given: iter(ids))
    pieces = [piece for piece in one.answer(USER) if piece]
    assert pieces == list(text)


def test_a_choice_is_a_row_that_dspref_trains_on(models: list[Path], tmp_path: Path) -> None:
    file, chat = tmp_path / "pairs.jsonl", [{"role": "system", "content": "be brief"}, *USER]
    choice.keep(file, choice.row_of(chat, "good \ud800", "bad", True))
    choice.keep(file, choice.row_of(USER, "fine", " worse", True))
    tokenizer = vocabulary.load_as_written(str(models[0]))
    file.write_text(file.read_text().replace("\\ud800", ""))
    pairs = load_pairs(
        [Source(str(file))], tokenizer, Limits(200), on_bad_row="error", cache_dir=tmp_path / "cache", log=print
    )
    assert len(pairs) == 2
    pair = pairs[0]
    assert tokenizer.decode(pair.prompt).startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello")
    assert tokenizer.decode(pair.chosen).startswith("good") and tokenizer.decode(pair.rejected).startswith("bad")
    text = choice.row_of(USER, "a", "b", False)
    assert text == {"prompt": "hello", "chosen": "a", "rejected": "b"}
    assert (
        choice.refusal(["a", " "]) == "an answer is empty" and choice.refusal(["a", "a"]) and not choice.refusal(["a", "b"])
    )


def test_control_sequences_of_a_model_are_shown_and_not_sent(
    models: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b[2Jred\x07\u202e\r\x9b1m"
    two = [speaker(models[0]), speaker(models[0])]
    monkeypatch.setattr(Speaker, "answer", lambda self, messages, images=(): iter([evil, "\nend"]))
    talk.Talk(["a", "b"], two, None, None).double(USER)
    talk.Talk(["a"], two[:1], None, None).single(USER)
    monkeypatch.setattr("sys.stdin", ["hi\n"])
    talk.Talk(["a"], two[:1], None, None).piped()
    said = capsys.readouterr().out
    assert "\\x1b[2Jred" in said and not re.search("[\x1b\x07\u202e\r\x9b]", said)
    with Sides(["one", "two"]) as sides:
        sides.add(1, evil)
    assert not re.search("[\x07\u202e\x9b]", capsys.readouterr().out)


def call(*arguments: str, lines: str = "") -> tuple[int, str]:
    done = CliRunner().invoke(app, ["chat", *arguments], prog_name="dspref", input=lines)
    return done.exit_code, done.output


def test_between_pipes_a_line_is_a_prompt_and_a_block_an_answer(models: list[Path]) -> None:
    one = str(models[0])
    expected = "".join(speaker(models[0], greedy=True, max_tokens=9).answer(USER))
    code, said = call(one, "--greedy", "--max-tokens", "9", lines="hello\n\nhello\n")
    assert (code, said) == (0, f"{expected}\n\n" * 2 + "line 2: is empty, and not asked\n")
    code, said = call(one, "--greedy", "--max-tokens", "9", "--json", lines="/quit\nhello\n")
    command, row = map(json.loads, said.splitlines())
    assert code == 0 and command["prompt"] == "/quit", "a command on a terminal, a text between pipes"
    assert row == {"line": 2, "prompt": "hello", "answers": [expected]}
    code, said = call(one, "--versus", str(models[1]), "--greedy", "--max-tokens", "9", lines="hello\n")
    assert code == 0 and said.startswith(f"1: {expected}\n2: ") and said.endswith("\n\n")
    drawn = [call(one, "--temperature", "2", "--seed", seed, "--max-tokens", "9", lines="hello\n") for seed in "778"]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_is_refused(models: list[Path], tmp_path: Path) -> None:
    one, two = map(str, models)
    for arguments, words in (
        ([f"{tmp_path}/none"], "no such folder"),
        ([str(models[0].parent)], "holds no model.safetensors (pickled weights are not read); save the model again"),
        (["some/model"], "some/model: is no folder here, and not had from the hub"),
        ([one, "--versus", "some/model"], "--versus: some/model: is no folder here"),
        ([two], "holds no tokenizer"),
        ([one, "--save", "x.jsonl"], "name the other model by --versus"),
        ([one, "--versus", two, "--save", "x.jsonl"], "a key pressed on a terminal"),
        ([one, "--greedy", "--temperature", "1"], "leave out --temperature"),
    ):
        code, said = call(*arguments)
        assert code == 2 and words in said and said.count("\n") == 1, said


@pytest.mark.slow
def test_on_a_terminal(models: list[Path], tmp_path: Path) -> None:
    """Two answers, a choice by a key, a stopped answer, Ctrl-D."""
    words = [str(models[0]), "--versus", str(models[1]), "--save", str(tmp_path / "p.jsonl"), "--max-tokens", "100"]
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "dspref", "chat", *words, "--greedy"]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    seen = b""

    def until(text: bytes, seconds: float = 90, press: bytes = b"") -> None:
        nonlocal seen
        end = time.monotonic() + seconds
        while text not in seen:
            assert time.monotonic() < end, seen
            if select.select([ours], [], [], 5)[0]:
                seen += os.read(ours, 65536)
            elif press:
                os.write(ours, press)
        seen = seen.split(text, 1)[1]

    until(b"you> ")
    os.write(ours, b"hello\n")
    until(b"s to skip: ")
    os.write(ours, b"2")
    until(b"you> ")
    os.write(ours, b"\x03")
    until(b"leaves)", press=b"\x03")  # readline hears none between showing its prompt and waiting for a key
    until(b"you> ")
    os.write(ours, b"\x04")
    until(b"1 row added")
    assert process.wait(30) == 0
    os.close(ours)
    (row,) = map(json.loads, (tmp_path / "p.jsonl").read_text().splitlines())
    assert row["prompt"] == USER and row["chosen"] != row["rejected"]


def test_a_prompt_without_room_between_pipes_has_no_answer(models: list[Path]) -> None:
    code, said = call(str(models[0]), "--greedy", "--max-tokens", "3", "--json", lines="x" * 300 + "\nhello\n")
    answers = [json.loads(line)["answers"][0] for line in said.splitlines() if line.startswith("{")]
    assert code == 3 and answers[0] is None and isinstance(answers[1], str)
    assert "line 1: no room: " in said and "/reset" not in said
    assert "1 prompt had no room for an answer; shorten them" in said
