"""The `dspref` command. Each command loads what it needs and no more: `--help` no config, `check` no torch."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dspref.errors import ConfigError, UserError

app = typer.Typer(
    help="Preference optimization with DeepSpeed, from one YAML file.", no_args_is_help=True, add_completion=False
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


class Precision(StrEnum):
    bfloat16 = "bfloat16"
    float32 = "float32"
    float16 = "float16"


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="RUN/checkpoints/step-N", help="A committed checkpoint.")],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="A folder that is not there yet.")],
    dtype: Annotated[Precision | None, typer.Option(help="Default: the run's model.dtype.")] = None,
) -> None:
    """Write the model of a checkpoint as from_pretrained loads it; of any ZeRO stage and number of ranks, without a GPU."""
    from dspref import launcher

    def job() -> None:
        from dspref.consolidate import consolidate

        consolidate(checkpoint, to, dtype.value if dtype else None)
        print(f"{checkpoint} -> {to}")

    raise typer.Exit(launcher.guarded(job))


def parse_share(text: str) -> tuple[int, int]:
    """'2/8' -> (2, 8)."""
    k, slash, n = text.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal() and int(k) < int(n)):
        raise ConfigError(f"--share: must be K/N with K from 0 to N - 1, such as 0/8, not {text!r}")
    return int(k), int(n)


if __name__ == "__main__":
    app()
