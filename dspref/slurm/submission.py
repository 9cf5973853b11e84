"""Submit a run, or a sweep of runs, to SLURM: a checked config and a readable job script in the run folder, then `sbatch`.

What comes from the user is quoted in the script, or refused; commands are lists of arguments, never text for a shell.
Loads no torch.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from dspref import config as configuration
from dspref import reading
from dspref.errors import ConfigError, EnvironmentFault
from dspref.files import read_object, write_atomically
from dspref.machine import inputs
from dspref.machine.context import CheckContext
from dspref.ranks import sharing
from dspref.run.finding import is_foreign
from dspref.run.record import misplaced
from dspref.slurm import asking
from dspref.slurm.asking import said
from dspref.slurm.script import Job, absolute, lint, log_file, options_of, render
from dspref.terminal import command

# A controller that is busy takes its time, and then has the job.
SUBMIT_SECONDS = 300
# Of a job, or of one task of an array.
NUMBER = re.compile(r"[0-9]+(_[0-9]+)?")
BEFORE_COMMENT = re.compile(r"""(?:\\.|'[^']*'|"(?:\\.|[^"\\])*"|[^#\\'"]|(?<=\S)\#|['"\\])*""", re.DOTALL)


class JobRun(NamedTuple):
    """A run of a job, checked."""

    folder: Path
    config: str
    """Resolved, as YAML."""
    saves: bool
    """Whether it leaves checkpoints to go on from."""
    on_hub: list[str]
    """`key value`, of what was not looked at."""
    sequence: int
    """Ranks that hold a pack between them."""


def submit(file: Path, overrides: Sequence[str], job: Job, sweep: Path | None = None, dry_run: bool = False) -> None:
    """Check, write and show the job of a run, or of each line of a sweep, and hand it to SLURM.

    Raises ConfigError before anything is written, also for what a config names and is not there, EnvironmentFault where
    SLURM refuses, OSError.
    """
    output_dir, run = load(file, overrides, looks=sweep is None)
    planned = load_sweep(file, [*overrides], sweep, output_dir) if sweep else [run]
    folder, runs = run.folder, [one.folder for one in planned]
    for one in planned:
        sharing.refuse(one.sequence, job.nodes * job.gpus_per_node)
    for place in {folder, *runs}:
        refuse_occupied(place)
    script = render(job, folder, runs, is_array=sweep is not None)
    lint(script)

    path = write(folder, planned, script)
    print(script)
    if on_hub := list(dict.fromkeys(name for one in planned for name in one.on_hub)):
        print(f"not checked (hub): {', '.join(on_hub)}")
    if not all(one.saves for one in planned):
        print("advice: checkpoint.save_every is null, so the loss of a node would cost all steps since the job's last start")
    if dry_run:
        print(f"nothing was submitted; the script is {path}")
        return
    number = sbatch(path, options_of(job, folder, len(runs) if sweep else 0))
    print(
        f"job     {number}, {job.nodes} x {job.gpus_per_node} GPUs for {job.time}" + f", {len(runs)} runs" * bool(sweep),
        flush=True,
    )
    record(number, folder, runs, is_array=sweep is not None)
    print(f"script  {path}")
    print(f"log     {log_file(folder, number, is_array=sweep is not None)}")
    print(f"next    {command('dspref', 'status', output_dir)}")


# ---------------------------------------------------------------------------------------------------------------------
# Configs


def load(file: Path, overrides: Sequence[str], looks: bool = True) -> tuple[str, JobRun]:
    """output_dir as the config has it, and the run; `looks`: with a look at the files and folders that it names."""
    config, positions = configuration.read(file, overrides)
    if not config.output_dir or not config.output_dir.isprintable():
        raise ConfigError(f"output_dir: {config.output_dir!r}: is empty or does not print; choose another folder")
    if config.checkpoint.resume == "never":
        raise ConfigError("checkpoint.resume: never would begin again at every requeue; use auto and another output_dir=")
    on_hub = inputs.refuse(CheckContext(config).look(file.parent), positions) if looks else []
    saves = config.checkpoint.save_every is not None
    return config.output_dir, JobRun(
        absolute(config.output_dir), configuration.dump(config), saves, on_hub, config.parallel.sequence
    )


def load_sweep(file: Path, overrides: list[str], sweep: Path, root: str) -> list[JobRun]:
    """One run per line of `sweep`, whose words are overrides; each has an output_dir of its own. All faults at once."""
    try:
        lines = reading.read_text(sweep).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{sweep}: cannot be read ({reading.words(error)})") from None
    runs: list[JobRun] = []
    taken = {absolute(root)}
    faults = []
    for number, line in enumerate(lines, start=1):
        try:
            if words := shlex.split(without_comment(line)):
                runs.append(load(file, [*overrides, f"output_dir={json.dumps(f'{root}/{len(runs)}')}", *words])[1])
                if (folder := runs[-1].folder) in taken:
                    raise ConfigError(f"output_dir: {folder} is taken by the sweep or a line before; give each run its own")
                taken.add(folder)
        except (ConfigError, ValueError) as error:  # ValueError: a quote that nobody closes
            faults += [f"{sweep}:{number}: {fault}" for fault in str(error).splitlines()]
    if faults or not runs:
        raise ConfigError("\n".join(faults) or f"{sweep}: holds no run; write the overrides of one run on each line")
    return runs


def without_comment(line: str) -> str:
    """A line up to a # that begins a word, as in bash: within one, as in a path, it is a character like others."""
    found = BEFORE_COMMENT.match(line)
    return found[0] if found else ""


def refuse_occupied(run: Path) -> None:
    """Raise ConfigError for a folder of somebody else, and for a run whose job has not ended: two would write one run."""
    if os.path.lexists(run) and not os.path.isdir(run):
        kind = "a file" if os.path.exists(run) else "a link that leads nowhere"
        raise ConfigError(f"output_dir: {run} is {kind}; choose another folder")
    if is_foreign(run):
        raise ConfigError(f"output_dir: {run} is not empty and holds no dspref run; choose another folder")
    if said := misplaced(run):
        raise ConfigError(f"output_dir: {said}")
    job = read_object(run / "submit" / "job.json").get("job")
    if not isinstance(job, str) or not NUMBER.fullmatch(job):
        return
    if state := asking.queued(job):
        raise ConfigError(f"output_dir: {run} belongs to job {job} ({state}); scancel {job} first, or use another folder")


# ---------------------------------------------------------------------------------------------------------------------
# The script


# ---------------------------------------------------------------------------------------------------------------------
# Files and SLURM


def write(folder: Path, runs: Sequence[JobRun], script: str) -> Path:
    """The configs into the folders of their runs, and the script into that of the job; its path."""
    path = folder / "submit" / "job.sbatch"
    for run in runs:
        (run.folder / "submit").mkdir(parents=True, exist_ok=True)
        write_atomically(run.folder / "submit" / "config.yaml", run.config)
    for place in (path.parent, folder / "logs"):  # SLURM drops a job whose log has no folder
        place.mkdir(parents=True, exist_ok=True)
    write_atomically(path, script)
    return path


def sbatch(script: Path, options: Sequence[str]) -> str:
    """The number of the new job. The options stand in the script too; as arguments they go before sbatch's variables."""
    if not shutil.which("sbatch"):
        raise EnvironmentFault(
            f"sbatch: no such command; submit from a login node of the cluster: {command('sbatch', script)}"
        )
    answered = asking.answer(["sbatch", "--parsable", *options, str(script)], seconds=SUBMIT_SECONDS)
    # Sites print a line of their own before it; of a federation it is job;cluster.
    number = (answered.stdout.split() or [""])[-1].partition(";")[0]
    if answered.returncode == asking.NO_ANSWER:
        raise EnvironmentFault(f"sbatch: {said(answered)}: the job may be queued all the same; look with squeue --me")
    if answered.returncode or not number.isdecimal():
        raise EnvironmentFault(f"sbatch: {said(answered).removeprefix('sbatch: ')}; mend the options, and submit again")
    return number


def record(number: str, folder: Path, runs: Sequence[Path], is_array: bool) -> None:
    """job.json beside the script, and for an array beside the config of each run."""
    log = str(log_file(folder, number, is_array))
    about: dict[str, Any] = {"job": number, "submitted": datetime.now(UTC).isoformat(timespec="seconds"), "log": log}
    for index, run in enumerate(runs if is_array else []):
        own = about | {"job": f"{number}_{index}", "log": str(log_file(folder, f"{number}_{index}", is_array=False))}
        write_atomically(run / "submit" / "job.json", json.dumps(own, indent=2) + "\n")
    if is_array:
        about["runs"] = [str(run) for run in runs]
    write_atomically(folder / "submit" / "job.json", json.dumps(about, indent=2) + "\n")
