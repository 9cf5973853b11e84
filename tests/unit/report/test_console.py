"""Text from data is shown as text: it breaks no terminal, no markup, and no shell that a command is pasted into."""

from __future__ import annotations

import shlex
import subprocess

import pytest

from dspref import distributed
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


SYSTEM = "You are a helpful assistant."


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        (f"system\n{SYSTEM}\nuser\nHi\nassistant\nHello!\nuser\ni am\nbored.\nassistant\n", "i am\nbored."),
        (f"system\n\n{SYSTEM}user\n\nHiassistant\n\n", f"system\n\n{SYSTEM}user\n\nHiassistant\n\n"),
        ("user\nHi\nmodel\n", "Hi"),
        ("user\nHi\nassistant\n<think>\n\n</think>\n\n", "Hi"),
        ("user\n\nassistant\n", "user\n\nassistant\n"),
        ("Who is\nuser\nzero?", "Who is\nuser\nzero?"),
        ("The sky is", "The sky is"),
    ],
)
def test_of_a_chat_the_last_question_is_shown(prompt, shown):
    assert console.asked(prompt) == shown


def test_an_answer_that_is_the_references_is_not_said_twice():
    rows = [{"prompt": "user\nHi\nassistant\n", "policy": policy, "reference": "Hello"} for policy in ("Hello", "Yo")]
    first, second = console.sample_lines(1, rows).splitlines()[1:]
    assert first == "  Hi  ->  Hello  (reference: the same)" and second == "  Hi  ->  Yo  (reference: Hello)"
    rows[0] = {"prompt": "Hi", "policy": "word " * 99 + "and left", "reference": "word " * 99 + "and right"}
    assert console.apart(rows[0]["policy"], rows[0]["reference"], 12) == ("…and left", "…and right"), "where they part"
    assert console.apart("a b", "a\nc", 12) == ("a b", "a c")
    long = console.sample_lines(1, [rows[1] | {"policy": "word " * 99}]).splitlines()
    assert [line.split()[0] for line in long[1:]] == ["Hi", "->", "reference:"] and max(map(len, long)) < console.NARROW


RECORD = {
    "loss": 0.6931, "rewards/accuracies": 0.5, "rewards/margins": 0.01234, "nll_loss": 2.0, "grad_norm": 1.25,
    "learning_rate": 5e-7, "perf/tokens_per_second": 12345.6,
}  # fmt: skip


@pytest.fixture
def log(tmp_path, monkeypatch):
    """The log file of this rank."""
    monkeypatch.setattr(distributed, "_log_file", None)
    distributed.log_to(tmp_path)
    return tmp_path / "rank-0.log"


@pytest.mark.parametrize("on_terminal", [True, False])
def test_a_step_is_a_line_of_the_log_with_the_time_left_from_the_first_on(on_terminal, log, monkeypatch, capsys):
    clock = iter([100.0, 160.0, 161.0])
    monkeypatch.setattr("sys.stdout.isatty", lambda: on_terminal, raising=False)
    monkeypatch.setattr(console, "now", lambda: next(clock))
    monkeypatch.setenv("COLUMNS", "100")
    view = console.ProgressView(2, 12)
    assert view.seconds_left is None
    view.show(3, RECORD)
    view.advance(3)
    assert view.seconds_left == 9 * 60.0, "a step of a minute has told it"
    view.advance(4)
    assert view.seconds_left == pytest.approx(8 * 61 / 2)
    view.note("step 4: checkpoint committed")
    view.close()
    (line, noted), shown = log.read_text().splitlines(), capsys.readouterr().out
    figures = "loss 0.6931  acc 0.5  margin 0.01234  nll 2  grad 1.25  lr 5e-07  12,346 tok/s"
    assert line.endswith(f" step 3/12  {figures}  9 min left") and noted.endswith(" step 4: checkpoint committed")
    assert "step 4: checkpoint committed" in shown
    if on_terminal:
        assert "loss 0.6931  lr 5e-07  12,346 tok/s  grad 1.25  acc 0.5" in shown and "4 min 4 s left" in shown
    else:
        assert shown.splitlines()[0].endswith(line[20:]) and shown.count("\n") == 2


def test_a_narrow_terminal_has_the_first_figures_whole():
    figures = ["loss 0.6931", "lr 5e-07", "12,346 tok/s"]
    assert [console.within(figures, width) for width in (5, 21, 34, 35)] == [
        "loss 0.6931", "loss 0.6931  lr 5e-07", "loss 0.6931  lr 5e-07", "loss 0.6931  lr 5e-07  12,346 tok/s",
    ]  # fmt: skip


@pytest.mark.parametrize("brief", [None, "one line"])
def test_what_the_banner_leaves_out_is_in_the_log(brief, log, capsys):
    console.banner({"model": "m", "scored": "s", "packs": "p", "run": "r"}, brief)
    console.first_pair("prompt    x")
    shown = capsys.readouterr().out
    assert shown == ("model   m\nrun     r\n" if brief is None else "one line\n")
    assert all(word in log.read_text() for word in ("model   m", "scored  s", "packs   p", "run     r", "prompt    x"))
