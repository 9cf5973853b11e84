"""The `dspref` command. Each command loads what it needs and no more: `--help` no config, `check` no torch."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import dspref
from dspref.commandline import Commands, OfRun, faults_in_one_line
from dspref.errors import ConfigError, UserError
from dspref.terminal import command, shown

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


class Format(StrEnum):
    text = "text"
    json = "json"


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


class Worst(StrEnum):
    length = "length"
    prompt = "prompt"
    margin = "margin"


@app.command(cls=OfRun)
def inspect(
    file: File,
    overrides: Overrides = None,
    row: Annotated[list[str] | None, typer.Option(metavar="N|FILE:N", help="A row by its line; repeatable.")] = None,
    worst: Annotated[Worst | None, typer.Option(help="The longest pair or prompt, or answers that differ most.")] = None,
    random: Annotated[int | None, typer.Option(metavar="N", min=1, help="So many pairs, drawn at random.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of --random; default 0.")] = None,
    held_out: Annotated[bool, typer.Option("--eval", help="Of the held-out pairs.")] = False,
    source: Annotated[str | None, typer.Option(metavar="NAME|N", help="Of one source, by its key in the YAML.")] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Show the id of each token.")] = False,
    ranks: Annotated[int, typer.Option(min=1, help="Plan the packs for so many.")] = 1,
    format: Annotated[Format, typer.Option(help="json: one object, for programs.")] = Format.text,
) -> None:
    """Look at pairs as the model will see them, and at the data in numbers. Loads no weights.

    Without --row, --worst or --random: the numbers, and the first pairs.
    """
    from dspref import config as configuration
    from dspref import launcher
    from dspref.machine import inputs
    from dspref.machine.context import CheckContext
    from dspref.objectives import build_objective

    with faults_in_one_line():
        tell_repeated(overrides)
        config, positions = configuration.read(file, overrides or [])
        inputs.refuse(CheckContext(config).look(file.parent), positions)

    def job() -> None:
        from dspref.training import inspection

        prompts = build_objective(**config.objective.model_dump()).scores_prompt
        asked = inspection.Asked(tuple(row or ()), worst and worst.value, random, seed, held_out, source, ids, ranks)
        inspection.inspect(config.model, config.data, config.train, prompts, asked, format is Format.json)

    raise typer.Exit(launcher.guarded(job, NOTHING_LOST))


@app.command(cls=OfRun)
def plan(
    file: File,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Of each node.")] = 8,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100-80, a100-40, l40s, 4090, b200, mi300x, or cpu.")] = "h100",
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpu_gib: Annotated[float | None, typer.Option(min=0.1, help="Memory of each GPU, in place of the card's.")] = None,
    utilisation: Annotated[
        float | None, typer.Option(min=0.01, max=1, help="Share of the peak that is assumed of all that is executed (HFU).")
    ] = None,
    mean_tokens: Annotated[
        int | None, typer.Option(min=2, help="Mean tokens of prompt + answer, instead of reading the data.")
    ] = None,
    format: Annotated[Format, typer.Option(help="json: everything, for programs.")] = Format.text,
) -> None:
    """Say what a run needs, without a GPU and without its weights: memory for every ZeRO stage, steps, time, disk; and
    what to change where it does not fit."""
    import json

    from dspref import config as configuration
    from dspref import launcher
    from dspref.machine import gpus as cards

    with faults_in_one_line():
        tell_repeated(overrides)
        config = configuration.load(file, overrides or [])
        card = cards.chosen(gpu, gpu_gib, utilisation, gpus)

    def job() -> None:
        from dspref.report import plan_table
        from dspref.training import stages

        # What is said of the data is for people.
        with redirect_stdout(sys.stderr if format is Format.json else sys.stdout):
            found = stages.foresee(config, card, gpus, nodes, mean_tokens)
        if format is Format.json:
            print(json.dumps(found, indent=2))
        else:
            plan_table.show(found)

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


class Dialect(StrEnum):
    trl = "trl"
    alignment_handbook = "alignment-handbook"
    axolotl = "axolotl"
    llamafactory = "llamafactory"
    open_instruct = "open-instruct"
    openrlhf = "openrlhf"


class Objective(StrEnum):
    dpo = "dpo"
    cpo = "cpo"
    simpo = "simpo"
    orpo = "orpo"


@app.command()
def convert(
    theirs: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="YAML or JSON, a shell or Python script.", callback=whole)
    ] = None,
    dialect: Annotated[Dialect | None, typer.Option("--from", help="Whose it is; default: told by its keys.")] = None,
    from_python: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read DPOConfig(...) and the like of a script.", callback=whole)
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="How many it ran on: the global batch. Default: 8.")] = None,
    objective: Annotated[Objective | None, typer.Option(help="Default: told by its keys and names.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="run.yaml", callback=whole)] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Turn a config of TRL, axolotl, LLaMA-Factory, alignment-handbook, open-instruct or OpenRLHF into a run's YAML.

    What has no place here, or means something else, is told in a comment. Nothing of a script is run."""
    from dspref.config import convert as conversion
    from dspref.files import write_atomically

    with faults_in_one_line():
        source = from_python or theirs
        if source is None or (from_python and theirs):
            raise ConfigError("dspref convert: give one file; see dspref convert --help")
        if output and output.exists() and not force:
            raise ConfigError(f"{output}: is there already; give another name, or --force to write over it")
        text = conversion.convert(source, dialect, gpus, objective, bool(from_python))
        if output:
            write_atomically(output, text)
            print(shown(f"{source} -> {output}; read its comments, then: {command('dspref', 'check', output)}"))
        else:
            print(text, end="")


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
        raise typer.Exit(launcher.refused(error)) from None

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
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The output_dir of a run, or of a sweep.", callback=whole)],
    as_json: Annotated[bool, typer.Option("--json", help="Everything that is known, for programs.")] = False,
) -> None:
    """Show how far a run is: state, step, time left, last checkpoint, goodput, restarts. Reads its files, and asks SLURM of
    its job where there is one."""
    import json

    from dspref.run import status
    from dspref.slurm import job_state

    def known(folder: Path, asks: bool = True) -> dict[str, Any]:
        about = status.read(folder)
        asks = asks and about["job"] and about["state"] != "finished"
        return job_state.joined(about, job_state.ask(about["job"]) if asks else None)

    with faults_in_one_line():
        if run.exists() and not run.is_dir():
            raise ConfigError(f"{run}: is no folder; give the output_dir of a run")
        about = known(run)
        # A controller that did not answer for the sweep is not waited for at each of its runs.
        runs = [known(Path(one), about["slurm"] is not None) for one in about["runs"] or [] if Path(one).exists()]
        if as_json:
            print(json.dumps(about | {"runs": runs} if runs else about, indent=2))
        else:
            print(status.show_sweep(runs) if runs else status.show(about))


def tell_repeated(overrides: list[str] | None) -> None:
    """An override that a later one replaces is said, as it may be a slip."""
    from dspref.config import repeated

    for line in repeated(overrides or []):
        print(line, file=sys.stderr)


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
