"""The `dspref` command. Each command loads what it needs and no more: `--help` no config, `check` no torch."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import dspref
from dspref.commandline import Commands, OfRun
from dspref.errors import ConfigError, ExitCode, UserError
from dspref.terminal import shown

app = typer.Typer(
    cls=Commands,
    help="Preference optimization with DeepSpeed, from one YAML file.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # they show the values of variables
)


# Said of a command that a signal stopped, and that has written nothing by then.
NOTHING_LOST = "before it was done; the same command begins anew"


def whole(path: Path | None) -> Path | None:
    """A path with the home folder in place of `~`, where the shell left it."""
    from dspref.config import expand

    try:
        return Path(expand(str(path))) if path else None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def version(asked: bool) -> None:
    if asked:
        print(f"dspref {dspref.__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print it and leave.")] = False,
) -> None:
    """Preference optimization with DeepSpeed, from one YAML file."""


File = Annotated[Path, typer.Argument(metavar="X.yaml", help="The run; see launch/configs.", callback=whole)]
ShellFile = Annotated[Path | None, typer.Option(metavar="FILE", help="A shell file to source first.", callback=whole)]
SweepFile = Annotated[Path | None, typer.Option(metavar="FILE", help="A job array: a run per line.", callback=whole)]
Checkpoint = Annotated[
    Path, typer.Argument(metavar="RUN/checkpoints/step-N", help="A committed checkpoint.", callback=whole)
]
AlsoFile = Annotated[Path | None, typer.Argument(metavar="[X.yaml]", help="Also check what this run needs.", callback=whole)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Values that replace the file's.")
]
Asked = Annotated[str | None, typer.Option(help="As sbatch takes it.")]


@app.command(cls=OfRun)
def check(
    file: File,
    overrides: Overrides = None,
    show: Annotated[bool, typer.Option(help="Print every key.")] = False,
    data: Annotated[bool, typer.Option("--data", help="Read and tokenize the data too, and show the first pairs.")] = False,
) -> None:
    """Check a run's YAML file without loading a model: keys, types, ranges, what goes together, and what it names."""
    from dspref import config as configuration
    from dspref.machine import inputs
    from dspref.machine.context import CheckContext
    from dspref.objectives import as_list

    with faults_in_one_line():
        tell_repeated(overrides)
        config, positions = configuration.read(file, overrides or [])
        on_hub = inputs.refuse(CheckContext(config).look(file.parent), positions)
    if show:
        print(configuration.dump(config), end="")
    else:
        if on_hub:
            print(f"not checked (hub): {', '.join(on_hub)}")
        said = f"{config.objective.name} / {' + '.join(as_list(config.objective.loss_type))}, ZeRO-{config.zero_stage}"
        print(shown(f"{file}: good; {said}, into {config.output_dir}"))
    if data:
        from dspref import launcher

        def job() -> None:
            from dspref.training import survey

            survey.report(config.model, config.data, colour=sys.stdout.isatty())

        raise typer.Exit(launcher.guarded(job, NOTHING_LOST))


@app.command(cls=OfRun)
def doctor(
    file: AlsoFile = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Check this machine: versions, GPUs, room, folders, locks. The report holds no secrets; paste it into an issue."""
    from dspref import config as configuration
    from dspref.machine import doctor
    from dspref.machine.context import CheckContext

    with faults_in_one_line():
        tell_repeated(overrides)
        config = configuration.load(file, overrides or []) if file else None
    report = doctor.examine(CheckContext(config), str(file or ""))
    print(doctor.as_json(report) if as_json else doctor.as_text(report), end="")
    raise typer.Exit(int(doctor.exit_code(report)))


@app.command()
def schema() -> None:
    """Print the JSON Schema of the YAML file, for editors."""
    from dspref import config as configuration

    print(configuration.schema(), end="")


@app.command(cls=OfRun)
def train(file: File, overrides: Overrides = None) -> None:
    """Train in this one process. For several: deepspeed launch/train.py --config X.yaml."""
    from dspref import launcher

    raise typer.Exit(launcher.main(["--config", str(file), *(overrides or [])]))


@app.command(cls=OfRun)
def score(
    file: File,
    overrides: Overrides = None,
    share: Annotated[str, typer.Option(metavar="K/N", help="Do the K-th of N parts, from 0: a job array.")] = "0/1",
    verify: Annotated[int, typer.Option(min=0, help="Score so many pairs, drawn at random, again, and compare.")] = 0,
) -> None:
    """Fill the reference store ahead of the run. Several ranks: srun, or torchrun --no-python, before this command."""
    from dspref import config as configuration
    from dspref import launcher

    try:
        part = parse_share(share)
        if launcher.first_rank(os.environ):
            tell_repeated(overrides)
        config = configuration.load(file, overrides or [])
    except UserError as error:
        if launcher.first_rank(os.environ):
            print(error, file=sys.stderr)
        raise typer.Exit(int(error.exit_code)) from None

    def job() -> None:
        from dspref.training import scorer

        scorer.score(config, part, verify)

    raise typer.Exit(launcher.guarded(job, "while it scored; the same command goes on"))


@app.command(cls=OfRun)
def submit(
    file: File,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="As many ranks run on each node.")] = 8,
    cpus_per_task: Annotated[int, typer.Option(min=1, help="For each rank.")] = 8,
    time: Annotated[str, typer.Option(help="Longest duration of one start.")] = "24:00:00",
    partition: Asked = None,
    account: Asked = None,
    qos: Asked = None,
    constraint: Asked = None,
    reservation: Asked = None,
    job_name: Annotated[str | None, typer.Option(help="Default: dspref- and the run folder's name.")] = None,
    mem: Annotated[str | None, typer.Option(help="Memory of each node.")] = None,
    exclusive: Annotated[bool, typer.Option("--exclusive", help="Share the nodes with nobody.")] = False,
    signal_seconds: Annotated[
        int | None,
        typer.Option(min=1, help="Commit a checkpoint so long before the end. Default: 300, or --time / 5."),
    ] = None,
    max_requeue: Annotated[int, typer.Option(min=0, help="Go on so often, each time only if a step was committed.")] = 20,
    env: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="For the ranks; repeatable.")] = None,
    setup: ShellFile = None,
    sweep: SweepFile = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write and show the job script, and stop there.")] = False,
) -> None:
    """Submit a run to SLURM: check it, write a job script into its folder, show that, and hand it to sbatch.

    One task per GPU under srun. Before its time ends the job commits a checkpoint, queues again and goes on.
    """
    from dspref import slurm

    with faults_in_one_line():
        tell_repeated(overrides)
        job = slurm.Job(
            nodes=nodes, gpus_per_node=gpus_per_node, cpus_per_task=cpus_per_task, time=time, partition=partition,
            account=account, qos=qos, constraint=constraint, reservation=reservation, job_name=job_name, mem=mem,
            exclusive=exclusive, signal_seconds=signal_seconds, max_requeue=max_requeue, env=tuple(env or ()),
            setup=Path(os.path.abspath(setup)) if setup else None,
        )  # fmt: skip
        slurm.submit(file, overrides or [], job, sweep, dry_run)


@app.command()
def status(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The output_dir of a run or a sweep, or a folder of runs.", callback=whole)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Everything that is known, for programs.")] = False,
) -> None:
    """Show how far a run is: state, step, time left, last checkpoint, loss, accuracy, evaluations; of several a line each.
    Reads its files, and asks SLURM of its job where there is one."""
    import json

    from dspref.run import status
    from dspref.slurm import job_state

    with faults_in_one_line():
        if run.exists() and not run.is_dir():
            raise ConfigError(f"{run}: is no folder; give the output_dir of a run")
        about, runs = job_state.known(run)
        if as_json:
            print(json.dumps(about | {"runs": runs} if runs else about, indent=2))
        else:
            print(status.show_sweep(runs, run) if runs else status.show(about))


class Form(StrEnum):
    html = "html"
    png = "png"
    md = "md"
    csv = "csv"


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs to compare, or folders of runs.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Default: report.html; md and csv: printed.", callback=whole),
    ] = None,
    format: Annotated[Form | None, typer.Option(help="Default: by the file's name, else html.")] = None,
) -> None:
    """Show what runs did, side by side: one HTML file with curves, evaluations, samples, settings and events, which needs no
    network; or a picture (png), tables to paste (md), every value (csv)."""
    from dspref.report import written

    with faults_in_one_line():
        text, file = written.report([found for run in runs if (found := whole(run))], output, format and format.value)
    if text:
        print(text, end="")
        return
    print(shown(f"{file}: written; open it in a browser" if file and file.suffix == ".html" else f"{file}: written"))


def tell_repeated(overrides: list[str] | None) -> None:
    """An override that a later one replaces is said, as it may be a slip."""
    from dspref.config import repeated

    for line in repeated(overrides or []):
        print(line, file=sys.stderr)


@contextmanager
def faults_in_one_line() -> Iterator[None]:
    """A user's mistake, or a disk's, becomes one line and its exit code."""
    try:
        yield
    except UserError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(int(error.exit_code)) from None
    except OSError as error:
        if not error.filename:
            raise
        remedy = "use a shorter name" if error.errno == errno.ENAMETOOLONG else "mend the permissions, or use another folder"
        print(shown(f"{error.filename}: {error.strerror}; {remedy}"), file=sys.stderr)
        raise typer.Exit(int(ExitCode.IO)) from None


class Precision(StrEnum):
    bfloat16 = "bfloat16"
    float32 = "float32"
    float16 = "float16"


@app.command()
def export(
    checkpoint: Checkpoint,
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="A folder that is not there yet.", callback=whole)],
    dtype: Annotated[Precision | None, typer.Option(help="Default: the run's model.dtype.")] = None,
) -> None:
    """Write the model of a checkpoint as from_pretrained loads it; of any ZeRO stage and number of ranks, without a GPU."""
    from dspref import launcher

    def job() -> None:
        from dspref.training.consolidate import consolidate

        consolidate(checkpoint, to, dtype.value if dtype else None)
        print(shown(f"{checkpoint} -> {to}"))

    raise typer.Exit(launcher.guarded(job, NOTHING_LOST))


def parse_share(text: str) -> tuple[int, int]:
    """'2/8' -> (2, 8)."""
    k, slash, n = text.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal() and int(k) < int(n)):
        raise ConfigError(f"--share: must be K/N with K from 0 to N - 1, such as 0/8, not {text!r}")
    return int(k), int(n)


if __name__ == "__main__":
    app()
