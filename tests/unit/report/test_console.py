"""Text from data is shown as text: it breaks no terminal, no markup, and no shell that a command is pasted into."""

from __future__ import annotations

import shlex
import subprocess

import pytest

from dspref.report import console
from dspref.run.history import Sample
from dspref.training import closing

HOSTILE = {
    "colours": "\x1b[31mred\x1b[0m",
    "title": "\x1b]0;owned\x07",
    "clipboard": "\x1b]52;c;cm0gLXJm\x07",
    "8-bit escape": "\x9b31mred",
    "carriage return": "good\rbad",
    "lines": "one\ntwo\u2028three\x0bfour",
    "backspace": "abc\b\b\bxyz",
    "closing markup": "[/x] [/bold] [/]",
    "opening markup": "[link=file:///etc/passwd]click[/link] [red on blue]x",
    "lone surrogate": "a\ud800b",
    "right to left": "a\u202eb\u2066c",
    "zero width": "a\u200bb\ufeffc",
    "emoji code": ":skull: \\[bold]",
    "long": "word " * 1000,
    "empty": "",
    "wide": "\u4f60\u597d " * 50,
}
FOR_A_SHELL = ["$(touch owned)", "`touch owned`", "a'; touch owned; '", '"; touch owned; "', "\\", "!!", "a & b > c"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_samples_are_one_table(name, capsys):
    text = HOSTILE[name]
    console.samples([Sample(3, text, "fine", text, None)])
    row = {"prompt": text, "policy": "fine", "reference": text, "chosen": text}
    console.ProgressView(0, 1).note(console.sample_lines(3, [row] * 5))
    shown = capsys.readouterr().out
    assert "step 3: 5 answers in samples.jsonl" in shown and shown.count("->") == console.SHORTLY
    shown.encode()  # a lone surrogate could not be written
    assert "fine" in shown
    assert all(character.isprintable() or character == "\n" for character in shown)


def test_markup_is_shown_as_it_stands(capsys):
    console.samples([Sample(3, "[/x] [red]y", "", None, "")] * (console.AT_THE_END + 2))
    shown = capsys.readouterr().out
    assert shown.count("[/x] [red]y") == console.AT_THE_END and "and 2 more in samples.jsonl" in shown
    learned = {"eval_[/x]_loss": (None, 0.5)}
    console.summary({"step": 1, "seconds": 1.0, "learned": learned}, {"model": "[/x]"}, ["echo [/x]"])
    assert capsys.readouterr().out.count("[/x]") == 3


@pytest.mark.parametrize("text", [*FOR_A_SHELL, *HOSTILE.values()])
def test_a_prompt_in_a_command_to_paste_runs_nothing(text, tmp_path):
    shown = closing.harmless(console.printable(text, limit=60))
    command = f"echo \"print('{shown}')\""
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == f"print('{shown}')\n" and not list(tmp_path.iterdir())
    assert len(shlex.split(command)) == 2
