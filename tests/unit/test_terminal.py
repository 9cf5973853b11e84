"""What is shown drives no terminal, and what is printed to be pasted runs nothing but what it says."""

from __future__ import annotations

import ast
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dspref import config, distributed, launcher, slurm, terminal
from dspref.errors import ConfigError, DataError, EnvironmentFault
from dspref.run.folder import RunFolder
from dspref.terminal import command, literal, shown
from dspref.training import closing

ROOT = Path(__file__).resolve().parents[2]

HOSTILE = [
    "r$(touch PWNED)", "r`touch PWNED`", 'r"; touch PWNED; "', "r'; touch PWNED; '", "r\\", "!!", "a b", "-n", "~", "*",
    "$HOME", "&& touch PWNED", "r\ntouch PWNED\n", "r\x1b[31m\x07", "r\x9b31m", "r\u202etxt.exe", "r\u2028x",
    "r\r\ntouch PWNED", "",
    "{a,b}", "a;touch PWNED", "#x", "r\udc80\udcff", "ä€", "'); __import__('os').system('touch PWNED'); ('",
    '"); __import__("os").system("touch PWNED"); ("', "{{x}}", "r\t", "r\x7f", "r\u200bx",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_shown_has_no_control_characters(text):
    said = shown(f"a {text}\n\tb")
    said.encode()
    assert all(c.isprintable() or c in "\n\t" for c in said)
    assert shown(said) == said


SPEAKS = """
import sys
from dspref.terminal import outlive_streams
outlive_streams()
outlive_streams()
for line in range(20_000):
    print("ä line of text", flush=line % 100 == 0)
print(sys.stdout.isatty(), file=sys.stderr)
sys.exit(3)
"""


@pytest.mark.parametrize("how", ["", "-u"])
@pytest.mark.parametrize("end", [">&-", ">/dev/full", "| head -1; exit ${PIPESTATUS[0]}", "2>&-", ">&- 2>&-", "> out"])
def test_nothing_ends_by_streams_that_nobody_reads(end, how, tmp_path):
    (tmp_path / "speaks.py").write_text(SPEAKS)
    line = f"{shlex.quote(sys.executable)} {how} speaks.py {end}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    if end == "> out":
        assert (tmp_path / "out").read_text() == "ä line of text\n" * 20_000
    if "2>" not in end:
        assert done.stderr == "False\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "ascii:replace"])
def test_what_a_terminal_has_no_character_for_is_an_escape(encoding):
    program = "from dspref.terminal import outlive_streams\noutlive_streams()\nprint('⟦你好\\udcff⟧')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=60)
    written = {"utf-8": "⟦你好\\udcff⟧", "ascii:replace": "?????"}.get(encoding, "\\u27e6\\u4f60\\u597d\\udcff\\u27e7")
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, f"{written}\n", b"")


def test_legitimate_text_stays():
    for text in ("a\nb\n\tc", "naïve 你好 🙂", "C:\\x1b", ""):
        assert shown(text) == text
    assert shown("\x1b[31m\u202e\x85\udc80") == "\\x1b[31m\\u202e\\x85\\udc80" and shown("a\r\nb") == "a\nb"
    assert shown("a\xa0b") == "a b"


@pytest.mark.parametrize("shell", ["bash -c", "bash --norc -ic"])
def test_the_words_of_a_command_arrive_as_they_are(shell, tmp_path):
    line = command("printf", "%s\\0", *HOSTILE)
    assert line.isprintable()
    done = subprocess.run([*shell.split(), line], cwd=tmp_path, capture_output=True, stdin=subprocess.DEVNULL)
    assert done.stdout.split(b"\0")[:-1] == [os.fsencode(text) for text in HOSTILE] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_in_python_code_is_that_text(text):
    assert literal(text).isprintable() and ast.literal_eval(literal(text)) == text


@pytest.mark.parametrize("text", [text for text in HOSTILE if text])
def test_the_next_line_runs_nothing_but_what_it_says(text, tmp_path, capfd, monkeypatch):
    """Pasted into a shell, with a python that only writes its arguments down: the code is whole and names the folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(RunFolder, "run", {"summary": {"step": 1, "seconds": 1.0, "learned": {}}})
    closing.show_summary(RunFolder(text))
    said = capfd.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in said)
    lines = [line.removeprefix("next").strip() for line in said.splitlines()][-3:]
    (tmp_path / "bin").mkdir()
    for program in ("python", "dspref"):
        (tmp_path / "bin" / program).write_text('#!/bin/sh\nprintf "%s\\0" "$@" >arguments\n')
        (tmp_path / "bin" / program).chmod(0o755)
    pasted = []
    for line in lines:
        done = subprocess.run(["bash", "-c", line], env=os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"})
        assert done.returncode == 0 and sorted(path.name for path in tmp_path.iterdir()) == ["arguments", "bin"]
        pasted.append(os.fsdecode((tmp_path / "arguments").read_bytes()).split("\0")[:-1])
    for name, (verb, folder) in zip(("report", "chat"), pasted, strict=False):
        assert verb == name and Path(folder) == Path(text) and not folder.startswith("-")
    flag, code = pasted[-1]
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert flag == "-c" and {ast.unparse(call.func).split("(")[0] for call in calls} == {"print", "pipeline"}
    assert str(Path(text) / "final") in [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]


def test_errors_and_logs_are_shown(capsys, tmp_path):
    escape = "\x1b]0;owned\x07\x9b2J\u202e"
    for kind in (ConfigError, DataError, EnvironmentFault):
        assert str(kind(f"a:1: {escape}\nb:2: fine")) == f"a:1: {shown(escape)}\nb:2: fine"
    distributed.log(escape)

    def bug():
        raise ValueError(escape)

    def no_file():
        open(tmp_path / f"{escape}/x")

    assert launcher.guarded(bug) == 1 and launcher.guarded(no_file) == 7
    log = distributed.LogFile(tmp_path / "log")
    log.write(f"{escape} 10%\r 20%\n")
    said = capsys.readouterr()
    for text in (said.out, said.err, (tmp_path / "log").read_text()):
        assert "owned" in text and all(c.isprintable() or c == "\n" for c in text)
    assert " 10%\n 20%\n" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (["--config", "\x1b[31m.yaml"], {}),
        (["--config", "run.yaml", "train.\x1b[31m=1"], {}),
        (["--config", "run.yaml", "\x9b=1"], {}),
        (["--config", "run.yaml", "train.seed=\x1b[31m"], {}),
        (["--config", "run.yaml", "--\x1b[31m"], {}),
        (["--config", "run.yaml"], {"RANK": "\x1b[31m"}),
        (["--config", "bad.yaml"], {}),
        (["--config"], {}),
    ],
)
def test_nothing_from_a_command_line_drives_the_terminal(words, environment, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    Path("run.yaml").write_text("model: {name_or_path: m}\ndata: {train: {path: p}}\noutput_dir: out\n")
    Path("bad.yaml").write_text('"a\\e[31m\\x9b\\u202e": 1\n')
    monkeypatch.setattr(launcher, "first_rank", lambda env: True)
    assert launcher.main(words) in (2, 4)
    said = capsys.readouterr().err
    assert said.endswith("\n") and said.count("\n") >= 1 and all(c.isprintable() or c == "\n" for c in said)


def test_a_name_that_is_too_long_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    long = "x" * 300
    Path("run.yaml").write_text("model: {name_or_path: m}\ndata: {train: {path: p}}\noutput_dir: out\n")
    for words in ([long], ["run.yaml", f"deepspeed={long}"], [f"{long}/{long}"], [f"ds_configs/{long}"]):
        assert launcher.main(["--config", *words]) == 2, words
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "Traceback" not in said

    def too_long():
        Path(long).mkdir()

    assert launcher.guarded(too_long) == 7
    assert "use a shorter one" in capsys.readouterr().err


def test_the_job_script_keeps_its_own_variables(tmp_path, monkeypatch):
    """`--env run=1` is for the ranks; and nothing is imported from the folder that the job was submitted from."""
    monkeypatch.chdir(tmp_path)
    theirs = (
        "run=1",
        "job=1",
        "code=75",
        "after=99",
        "IFS=x",
        "UID=0",
        "PATH=/nowhere",
        "python=x",
        "BASH_ENV=x",
        "LAST=a b",
    )
    job = slurm.Job(nodes=1, gpus_per_node=1, cpus_per_task=1, time="1", env=theirs)
    script = slurm.render(job, tmp_path / "r", [tmp_path / "r"], is_array=False)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/scontrol").write_text("#!/bin/sh\necho 127.0.0.1\n")
    (tmp_path / "bin/srun").write_text('#!/bin/bash\nprintf "%s\\0" "$@" >arguments\nexit 3\n')
    for tool in ("scontrol", "srun"):
        (tmp_path / "bin" / tool).chmod(0o755)
    names = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n", "SLURM_JOB_NUM_NODES": "1"}
    names["PATH"] = f"{tmp_path}/bin:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", script], env=os.environ | names, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    words = (tmp_path / "arguments").read_text().split("\0")[:-1]
    start = words.index("env")
    train = str(config.shipped("launch/train.py").resolve())
    assert words[start + 1 :] == [
        *theirs, sys.executable, "-P", "-u", train, "--config", f"{tmp_path}/r/submit/config.yaml",
    ]  # fmt: skip
    for line in script.splitlines():
        assert " -c " not in line or "-P" in script
    (tmp_path / "torch.py").write_text("open('PWNED', 'w')")
    (tmp_path / "os.py").write_text("open('PWNED', 'w')")
    subprocess.run([sys.executable, "-P", "-c", "import os, sys; assert '' not in sys.path"], check=True)
    assert not (tmp_path / "PWNED").exists()


def test_no_program_of_python_is_started_in_a_strangers_folder():
    """`python -c` and `-m` have the working folder first on their path."""
    for path in [*Path("dspref").rglob("*.py"), *Path("launch").rglob("*.*")]:
        if path.suffix not in (".py", ".j2"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            starts = '"-c"' in line or '"-m"' in line or "python | quote }} -c" in line
            assert not starts or "-P" in line or "terminal.command(" in line, f"{path}:{number}: {line}"


def test_columns_are_those_that_are_asked_for(monkeypatch):
    """By $COLUMNS, which `COLUMNS=80 dspref inspect X.yaml | less` sets; there is no terminal here."""
    assert terminal.columns(100) == 100
    monkeypatch.setenv("COLUMNS", "72")
    assert terminal.columns(100) == 72
