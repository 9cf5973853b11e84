"""The command line: one entry for all forms, and a line for what it does not know."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import typer
from tiny import save_tokenizer, tiny_config
from typer.testing import CliRunner

import dspref
from dspref import launcher
from dspref.cli import app
from dspref.commandline import faults_in_one_line

ROOT = Path(__file__).resolve().parents[2]
MINIMAL = {"model": {"name_or_path": "some/model"}, "data": {"train": "some/data"}, "output_dir": "out"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(json.dumps(MINIMAL))
    return tmp_path


def call(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments, prog_name="dspref")
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


def test_the_version() -> None:
    assert call("--version") == (0, f"dspref {dspref.__version__}\n")
    told = subprocess.run([sys.executable, "-m", "dspref", "--version"], capture_output=True, text=True, timeout=60)
    assert (told.returncode, told.stdout) == (0, f"dspref {dspref.__version__}\n")


def test_completion_is_offered() -> None:
    assert "--install-completion" in call("--help")[1]


@pytest.mark.parametrize(
    "arguments",
    ["x.yaml", "--config x.yaml", "--config=x.yaml", "train.seed=3 --config x.yaml", "--show --config=x.yaml"],
)
def test_the_run_may_be_named_as_to_the_launcher(arguments: str) -> None:
    code, said = call("check", *arguments.split())
    assert code == 0, said


def test_an_option_for_a_key_is_answered_with_the_way_to_set_it() -> None:
    for command in ("check", "train", "score", "submit"):
        code, said = call(command, "x.yaml", "--learning_rate", "1e-6")
        words = " ".join(said.replace("│", " ").split())
        assert code == 2 and "--learning_rate: no such option" in words and "section.key=value, without dashes" in words


def test_overrides_given_twice_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = call("check", "x.yaml", "train.seed=3", "train.seed=4")
    assert code == 0 and "override 'train.seed=3': is replaced by 'train.seed=4' behind it\n" in said
    assert launcher.main(["--config", "x.yaml", "train.sed=3", "train.sed=4"]) == 2
    assert "is replaced by" in capsys.readouterr().err


def test_home_is_home_in_every_argument(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(elsewhere))
    assert call("check", "~/x.yaml")[0] == 0
    for arguments in (
        ("status", "~/run"),
        ("export", "~/run", "--to", "~/model"),
        ("submit", "~/x.yaml", "--setup", "~/no.sh"),
    ):
        code, said = call(*arguments)
        assert code in (2, 3) and "~" not in said, (arguments, said)
    assert not Path("~").exists()


@pytest.mark.parametrize(
    ("rank", "local", "speaks"), [("0", "0", True), ("1", "1", False), ("4", "0", True), ("7", "3", False)]
)
def test_ranks_that_are_silent_give_the_first_time_to_speak(rank, local, speaks, elsewhere, monkeypatch, capsys) -> None:
    """A launcher ends all ranks as soon as one has left. Where it has not, only another machine has the fault."""
    waits = [] if rank == "0" else [launcher.WORD_SECONDS]
    where = {"RANK": rank, "WORLD_SIZE": "8", "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": "4", "TMPDIR": str(elsewhere)}
    for name, value in where.items():
        monkeypatch.setenv(name, value)
    slept: list[float] = []
    monkeypatch.setattr(launcher.time, "sleep", slept.append)
    assert launcher.main(["--config", "x.yaml", "train.sed=3"]) == 2
    said = capsys.readouterr().err
    assert slept == waits and bool(said) is speaks
    assert said.startswith(f"{socket.gethostname()}: " if waits and speaks else "") and said.count("\n") == speaks


@pytest.mark.parametrize(
    ("library", "raises", "says"),
    [
        (
            "deepspeed",
            "ImportError('libcudart.so.12: cannot open shared object file')",
            "libcudart.so.12: cannot open shared",
        ),
        ("torch", "OSError('compiled for another machine')", "compiled for another machine"),
        ("transformers", "ModuleNotFoundError('No module named \\'regex\\'', name='regex')", "No module named 'regex'"),
    ],
)
def test_a_library_that_cannot_be_loaded_is_the_machines_fault(library, raises, says, elsewhere: Path) -> None:
    """Whatever it raises: no traceback, and the exit code that says so."""
    (elsewhere / "broken").mkdir()
    (elsewhere / f"broken/{library}.py").write_text(f"raise {raises}\n")
    paths = os.pathsep.join([str(elsewhere / "broken"), str(ROOT)])
    command = [sys.executable, str(ROOT / "launch/train.py"), "--config", "x.yaml"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 4, done.stderr
    assert done.stderr.startswith(f"{library} cannot be loaded: {says}") and done.stderr.count("\n") == 1


def test_what_dspref_itself_does_wrong_is_a_bug() -> None:
    for fault in (ImportError("cannot import name 'x'", name="dspref.data"), ValueError("no"), OSError(2, "no", "file")):
        assert launcher.unloadable(fault) is None
    assert launcher.unloadable(ImportError("No module named 'peft'", name="peft")) is not None


def test_a_library_that_does_not_load_is_told_by_what_it_raised_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """transformers says the same of all that fails in its imports. A torchvision of another torch fails in each command."""
    code = compile("raise RuntimeError('operator torchvision::nms does not exist')", "torchvision.py", "exec")
    with pytest.raises(typer.Exit) as left, faults_in_one_line():
        try:
            exec(code, {"__name__": "torchvision"})
        except RuntimeError as error:
            raise ModuleNotFoundError("Could not import module 'PreTrainedModel'.") from error
    said = capsys.readouterr().err
    assert left.value.exit_code == 4 and said.count("\n") == 1
    assert said.startswith(
        "torchvision cannot be loaded: operator torchvision::nms does not exist; install torchvision from"
    )


def test_every_fault_of_a_config_reaches_the_terminal() -> None:
    code, said = call("check", "x.yaml", "train.lerning_rate=1", "model.dtype=bf16", "train.seed=x")
    assert code == 2 and said.count("\n") == 3


def test_the_data_are_shown_as_a_run_would_read_them(elsewhere: Path) -> None:
    """Rows, what was left out and why, lengths, and the first pairs with what is scored in brackets."""
    size = save_tokenizer("model")
    tiny_config("qwen2", size).save_pretrained("model")
    rows = [{"prompt": f"Say {k}.", "chosen": f"yes {k}", "rejected": f"no {k}"} for k in range(5)] + [{"prompt": "x"}]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"model": {"name_or_path": "model", "init": "random"}, "output_dir": "out"}
    data = {"train": "p.jsonl", "eval": "p.jsonl", "on_bad_row": "drop"}
    Path("x.yaml").write_text(json.dumps(values | {"data": data}))
    code, said = call("check", "--data", "x.yaml")
    assert code == 3 and "data.eval: p.jsonl is trained on too" in said, "as the run would say"
    Path("x.yaml").write_text(json.dumps(values | {"data": data | {"eval": {"path": "p.jsonl", "split": "train"}}}))
    code, said = call("check", "--data", "x.yaml")
    assert code == 0, said
    assert "data.train  p.jsonl" in said and "data.eval  p.jsonl" in said
    assert "rows 6, pairs 5 of 6" in said and "left out 1 of 6" in said
    assert "p.jsonl:1\nprompt    Say 0." in said and "[[yes 0" in said and "[[no 2" in said and "no 3" not in said
    assert not Path("out").exists()
    code, said = call("check", "--data", "x.yaml", "data.on_bad_row=error")
    assert code == 3 and "p.jsonl:6: " in said and "Traceback" not in said
    most = tiny_config("qwen2", size).max_position_embeddings
    code, said = call("check", "--data", "x.yaml", f"data.max_length={most + 1}")
    assert code == 2 and f"data.max_length: {most + 1} is beyond the model's {most} positions" in said
    Path("p.jsonl").write_text(json.dumps({"prompt": "q", "chosen": "yes " * most, "rejected": "no"}) + "\n")
    code, said = call("check", "--data", "x.yaml", "data.max_length=null")
    assert code == 2 and f"beyond the model's {most} positions" in said and "rows 1, pairs 1 of 1" in said
    single = [{"prompt": "q", "completion": "yes", "label": True}, {"prompt": "r", "completion": "no", "label": False}]
    Path("s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in single))
    for of in ("data.train=s.jsonl", "data.eval=s.jsonl"):
        code, said = call("check", "--data", "x.yaml", "data.eval=null", of)
        assert code == 3 and "s.jsonl:1: one answer and a label" in said and "objective.name: kto or bco" in said
    assert call("check", "--data", "x.yaml", "objective.name=kto", "data.train=s.jsonl", "data.eval=null")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check"], "dspref check: Missing argument 'X.yaml'; see dspref check --help"),
        (["check", "-x", "x.yaml"], "dspref check: No such option: -x"),
        (["chek", "x.yaml"], "dspref: No such command 'chek'. Did you mean 'check'"),
        (["check", "x.yaml", "--data=3"], "Option '--data' does not take a value"),
        (["check", "x.yaml", "--nope"], "--nope: no such option; a value of the run is changed by section.key=value"),
        (["check", "x.yaml", "--config"], "--config: the path of a YAML file is missing"),
        (["submit", "x.yaml", "--nodes", "zero"], "'--nodes'"),
        (["submit", "x.yaml", "--nodes", "0"], "'--nodes'"),
        (["submit", "x.yaml", "--time"], "Option '--time' requires an argument"),
        (["score", "x.yaml", "--verify", "-1"], "'--verify'"),
        (["export", "x"], "dspref export: Missing option '--to'"),
        (["export", "x", "--to", "y", "--dtype", "int8"], "'int8' is not one of 'bfloat16'"),
        (["check", "a\nb.yaml"], "has characters that do not print"),
        (["check", "~nobody-here/x.yaml"], "no such user"),
        (["check", "--no\u202e\npe\x1b[31m", "x.yaml"], "no such option"),
        (["n\u202eope\x1b[31m"], "No such command"),
        (["check", "x.yaml", "--token=hf_" + "a1" * 17], "--token=***: no such option"),
        (["--nope"], "dspref: No such option: --nope"),
    ],
)
def test_a_mistake_in_the_command_line_is_one_line(arguments: list[str], said: str) -> None:
    code, told = call(*arguments)
    assert (code, told.count("\n")) == (2, 1), told
    assert said in told and told[:-1].isprintable()


def test_help_is_shown_where_nothing_is_asked() -> None:
    assert call()[1].strip() == call("--help")[1].strip() != ""


def test_keys_and_data_are_both_shown_where_both_are_asked_for(elsewhere: Path) -> None:
    tiny_config("qwen2", save_tokenizer("model")).save_pretrained("model")
    Path("p.jsonl").write_text(json.dumps({"prompt": "q", "chosen": " yes", "rejected": " no"}) + "\n")
    values = {"model": {"name_or_path": "model", "init": "random"}, "data": {"train": "p.jsonl"}, "output_dir": "out"}
    Path("x.yaml").write_text(json.dumps(values))
    code, said = call("check", "--show", "--data", "x.yaml")
    assert code == 0 and "  on_overlong: truncate\n" in said and "rows 1, pairs 1 of 1" in said


@pytest.mark.parametrize("own", [{}, {"PYTORCH_ALLOC_CONF": "x"}, {"PYTORCH_CUDA_ALLOC_CONF": "x"}, {"GOMP_SPINCOUNT": "9"}])
def test_what_torch_reads_is_set_where_the_user_has_not(own: dict[str, str]) -> None:
    """Segments of GPU memory that grow; a user's own setting stands, under either of its names, and alone."""
    environment = dict(own)
    launcher.prepare(environment)
    allocator = {name: value for name, value in environment.items() if name in launcher.ALLOCATOR}
    given = {name: value for name, value in own.items() if name in launcher.ALLOCATOR}
    assert allocator == (given or dict.fromkeys(launcher.ALLOCATOR, "expandable_segments:True"))
    assert environment["GOMP_SPINCOUNT"] == own.get("GOMP_SPINCOUNT", "1000")


@pytest.mark.parametrize(
    ("script", "arguments", "code", "said"),
    [("train.py", [], 2, "--config: is missing"), ("submit.py", ["--help"], 0, "--nodes")],
)
def test_the_scripts_find_the_package_beside_them(script: str, arguments: list[str], code: int, said: str) -> None:
    """Without an install: `-S` leaves out what pip noted beside the packages, which are found by name."""
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib"), "COLUMNS": "200"}
    command = [sys.executable, "-S", str(ROOT / "launch" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=120)
    assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done.stdout + done.stderr


def test_the_command_itself_loads_neither_config_nor_torch() -> None:
    """`dspref --help` answers at once."""
    program = "import sys, dspref.cli; print(*sorted({'dspref.config', 'pydantic', 'torch'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "\n"


def test_a_folder_that_is_gone_is_said(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (elsewhere / "gone").mkdir()
    monkeypatch.chdir("gone")
    (elsewhere / "gone").rmdir()
    with pytest.raises(SystemExit) as end:
        app(["check", str(elsewhere / "x.yaml")])
    assert end.value.code == 4 and "the folder that you are in has been deleted" in capsys.readouterr().err
