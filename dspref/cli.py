"""The `dspref` command. Each command loads what it needs and no more: `--help` no config, `check` no torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from dspref.errors import ConfigError, ExitCode, UserError

app = typer.Typer(
    help="Preference optimization with DeepSpeed, from one YAML file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they show the values of variables
)

File = Annotated[Path, typer.Argument(metavar="X.yaml", help="The run; see launch/configs.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Values that replace the file's.")
]


@app.command()
def check(
    file: File, overrides: Overrides = None, show: Annotated[bool, typer.Option(help="Print every key.")] = False
) -> None:
    """Check a run's YAML file without loading a model: keys, types, ranges, what goes together."""
    from dspref import config as configuration
    from dspref.objectives import as_list

    try:
        config = configuration.load(file, overrides or [])
    except UserError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(int(error.exit_code)) from None
    if show:
        print(configuration.dump(config), end="")
    else:
        print(
            f"{file}: good; {config.objective.name} / {' + '.join(as_list(config.objective.loss_type))}, "
            f"ZeRO-{config.zero_stage}, into {config.output_dir}"
        )


@app.command()
def doctor(
    file: Annotated[Path | None, typer.Argument(metavar="[X.yaml]", help="Also check what this run needs.")] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Check this machine: versions, GPUs, room, folders, locks. The report holds no secrets; paste it into an issue."""
    from dspref import config as configuration
    from dspref import doctor

    try:
        config = configuration.load(file, overrides or []) if file else None
    except UserError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(int(error.exit_code)) from None
    report = doctor.examine(config, str(file or ""))
    print(doctor.as_json(report) if as_json else doctor.as_text(report), end="")
    raise typer.Exit(int(ExitCode.ENVIRONMENT if report["verdict"] == "FAIL" else ExitCode.DONE))


@app.command()
def schema() -> None:
    """Print the JSON Schema of the YAML file, for editors."""
    from dspref import config as configuration

    print(configuration.schema(), end="")


@app.command()
def train(file: File, overrides: Overrides = None) -> None:
    """Train in this one process. For several: deepspeed launch/train.py --config X.yaml."""
    from dspref import launcher

    raise typer.Exit(launcher.main(["--config", str(file), *(overrides or [])]))


@app.command()
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
        config = configuration.load(file, overrides or [])
    except UserError as error:
        if launcher.first_rank(os.environ):
            print(error, file=sys.stderr)
        raise typer.Exit(int(error.exit_code)) from None

    def job() -> None:
        from dspref import scorer

        scorer.score(config, part, verify)

    raise typer.Exit(launcher.guarded(job))


def parse_share(text: str) -> tuple[int, int]:
    """'2/8' -> (2, 8)."""
    k, slash, n = text.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal() and int(k) < int(n)):
        raise ConfigError(f"--share: must be K/N with K from 0 to N - 1, such as 0/8, not {text!r}")
    return int(k), int(n)


if __name__ == "__main__":
    app()
