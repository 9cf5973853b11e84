"""The job script: a template, of which every value is quoted or refused."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dspref import config as configuration
from dspref.errors import ConfigError, EnvironmentFault
from dspref.secrets import is_telling, kind_of
from dspref.slurm.asking import answer, said

# What a value in an #SBATCH line may be made of: SLURM's own words, and nothing that ends or splits the line.
MARKS = "_.,:@/=+-[]&|*()!"
PLAIN = re.compile(rf"[\w{re.escape(MARKS)}]+")
# Of a file between double quotes, spaces too.
PLACE = re.compile(rf"[\w {re.escape(MARKS)}]+")
DURATION = re.compile(r"(?:([0-9]+)-)?([0-9]+)(?::([0-9]+))?(?::([0-9]+))?")
# What tells a rank which it is: the job's own srun does.
OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Job:
    """What is asked of SLURM, in sbatch's own words; None leaves it to the cluster."""

    nodes: int
    gpus_per_node: int
    cpus_per_task: int
    time: str
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    job_name: str | None = None
    mem: str | None = None
    exclusive: bool = False
    signal_seconds: int | None = None
    """None: 300, or a fifth of a `time` that is shorter than 25 minutes."""
    max_requeue: int = 20
    env: tuple[str, ...] = ()
    """NAME=VALUE, for the ranks."""
    setup: Path | None = None
    """A shell file that the job sources first."""

    @property
    def seconds_to_leave(self) -> int:
        """So long before its end a start of the job is asked to stop. Raises ConfigError where it would be as it begins."""
        whole = seconds_of(self.time)
        if self.signal_seconds is None:
            return max(min(300, int(whole // 5)), 1) if whole else 300
        if whole and self.signal_seconds >= whole:
            raise ConfigError(
                f"--signal-seconds: {self.signal_seconds}, but --time {self.time} is {whole:.0f} s: the job would be asked "
                "to stop as it begins; raise --time, or drop --signal-seconds"
            )
        return self.signal_seconds


def seconds_of(time: str) -> float | None:
    """A duration in SLURM's words; None for one without end. Raises ConfigError for what is none."""
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return None
    if not (found := DURATION.fullmatch(time)):
        raise ConfigError(f"--time: {time!r}: is no duration; give minutes, H:MM:SS or days-hours (90, 24:00:00, 2-12)")
    days, *parts = found.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is None and len(numbers) < 3:  # minutes, minutes:seconds
        numbers = [0, *numbers]
    hours, minutes, seconds = [*numbers, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def render(job: Job, folder: Path, runs: Sequence[Path], is_array: bool) -> str:
    """The job script. Raises ConfigError for a value that cannot stand in it."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    if job.setup and not os.path.isfile(job.setup):
        raise ConfigError(f"--setup: {job.setup}: no such file; give a shell file that the job is to source")
    template = configuration.shipped("launch/slurm/run.sbatch.j2").read_text(encoding="utf-8")
    jinja = SandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    jinja.filters["quote"] = quote
    return jinja.from_string(template).render(
        job=job,
        options=[header(option) for option in options_of(job, folder, len(runs) if is_array else 0)],
        folder=absolute("."),
        environment=[named(text) for text in job.env],
        array=is_array,
        runs=runs,
        python=sys.executable,
        train=configuration.shipped("launch/train.py").resolve(),
        verdict=configuration.shipped("launch/slurm/verdict.py").resolve(),
    )


def options_of(job: Job, folder: Path, tasks: int) -> list[str]:
    """The options of sbatch, for an array of `tasks`, if any."""
    if "%" in str(folder):
        raise ConfigError(f"output_dir: {str(folder)!r}: SLURM replaces what follows a %; choose another folder")
    name = re.sub(r"[^\w.-]", "-", f"dspref-{folder.name}") if job.job_name is None else job.job_name
    asked = {
        "--job-name": name, "--nodes": job.nodes, "--ntasks-per-node": job.gpus_per_node,
        "--gpus-per-node": job.gpus_per_node, "--cpus-per-task": job.cpus_per_task, "--mem": job.mem, "--time": job.time,
        "--partition": job.partition, "--account": job.account, "--qos": job.qos, "--constraint": job.constraint,
        "--reservation": job.reservation,
    }  # fmt: skip
    given = {option: str(value) for option, value in asked.items() if value is not None}
    for option, value in [*given.items(), ("output_dir", str(folder))]:
        if not (PLACE if option == "output_dir" else PLAIN).fullmatch(value):
            raise ConfigError(f"{option}: {value!r}: an #SBATCH line holds letters, digits and {MARKS} only; choose another")
    options = [f"{option}={value}" for option, value in given.items()]
    options += ["--exclusive"] * job.exclusive + [f"--array=0-{tasks - 1}"] * bool(tasks)
    # To the script's shell, which asks the ranks: they commit a checkpoint and leave with exit code 75.
    options += ["--open-mode=append", f"--signal=B:USR1@{job.seconds_to_leave}"]
    options += ["--requeue"]  # after the loss of a node SLURM itself starts the job again
    # SLURM would hand the ranks nothing where a site has SBATCH_EXPORT=NONE.
    return [*options, "--export=ALL", f"--output={log_file(folder, '%A_%a' if tasks else '%j', is_array=False)}"]


def header(option: str) -> str:
    """An option as it stands in an #SBATCH line."""
    name, equals, value = option.partition("=")
    return f'{name}{equals}"{value}"' if " " in value else option


def absolute(folder: str) -> Path:
    return Path(os.path.abspath(folder))


def log_file(folder: Path, job: str, is_array: bool) -> Path:
    return folder / "logs" / f"slurm-{job}{'_*' if is_array else ''}.out"


def named(text: str) -> tuple[str, str]:
    """'NAME=VALUE' -> (NAME, VALUE)."""
    name, equals, value = text.partition("=")
    if not equals or not NAME.fullmatch(name):
        raise ConfigError(f"--env: {text!r}: not of the form NAME=VALUE")
    if name in OF_A_RANK or name.startswith("SLURM_"):
        raise ConfigError(f"--env: {name}: is the launcher's, which gives each rank its own; leave it out")
    if is_telling(name) or kind_of(value, {}):
        raise ConfigError(f"--env: {name}: would stand in a file; export it before submitting, SLURM hands it to the job")
    return name, value


def quote(text: object) -> str:
    """One word for the shell, on one line."""
    if not str(text).isprintable():
        raise ConfigError(f"{str(text)!r}: has characters that do not print, and cannot stand in a job script")
    return shlex.quote(str(text))


def lint(script: str) -> None:
    """Raise where the script is not sound shell."""
    # Of shellcheck's opinion, which every version has more of, only what it calls an error.
    for words in (["bash", "-n"], ["shellcheck", "--shell=bash", "--severity=error", "-"]):
        if shutil.which(words[0]) and (found := answer(words, script)).returncode:
            raise EnvironmentFault(f"the job script is not sound: {words[0]}: {said(found)}; please report this")
