"""Commands that look: at a config, at data, at a machine, at what a run will need and at what it has done. None trains."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dspref.commandline import (
    NOTHING_LOST,
    AlsoFile,
    File,
    Format,
    OfRun,
    Overrides,
    app,
    expanded,
    faults_in_one_line,
    tell_repeated,
    whole,
)
from dspref.errors import ConfigError
from dspref.terminal import command, shown


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
    from dspref.objectives import as_list, build_objective

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

            objective, colour = build_objective(**config.objective.model_dump()), sys.stdout.isatty()
            survey.report(config.model, config.data_read, config.train, objective, colour, config.log.samples_file)

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
    ranks: Annotated[int | None, typer.Option(min=1, help="Plan the packs for so many; default: parallel.sequence.")] = None,
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

        objective = build_objective(**config.objective.model_dump())
        shared = config.parallel.sequence
        asked = inspection.Asked(
            tuple(row or ()), worst and worst.value, random, seed, held_out, source, ids, ranks or shared, shared
        )
        inspection.inspect(config.model, config.data_read, config.train, objective, asked, format is Format.json)

    raise typer.Exit(launcher.guarded(job, NOTHING_LOST))


@app.command(cls=OfRun)
def evaluate(
    file: File,
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="RUN|CHECKPOINT|MODEL", help="Default: what the run begins with.", callback=expanded),
    ] = None,
    format: Annotated[Format, typer.Option(help="json: one object, for programs.")] = Format.text,
) -> None:
    """Evaluate a model on the run's held-out pairs (data.eval) and nothing else, as the run does.

    Rows with a `subset` column: accuracy by subset too. Several ranks: srun, or torchrun --no-python, before this
    command."""
    import json

    from dspref import config as configuration
    from dspref import launcher

    with faults_in_one_line():
        tell_repeated(overrides)
        config = configuration.load(file, overrides or [])

    def job() -> None:
        from dspref.report import evaluations
        from dspref.training import held_out, stages

        asked = held_out.Asked(
            config.model, config.data_read, config.objective.model_dump(), stages.reference_spec(config), config.train.seed,
            Path(config.output_dir),
        )  # fmt: skip
        # What is said on the way is for people.
        with redirect_stdout(sys.stderr if format is Format.json else sys.stdout):
            found = held_out.held_out(asked, model)
        if launcher.first_rank(os.environ):
            print(json.dumps(found, indent=2) if format is Format.json else evaluations.in_text(found), end="")

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
    from dspref.convert import conversion
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
            still = conversion.to_fill_in(text)
            said = f"{still} value{'s' * (still > 1)} to fill in (FILL_IN); " if still else ""
            print(shown(f"{source} -> {output}; {said}read its comments, then: {command('dspref', 'check', output)}"))
        else:
            print(text, end="")


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
