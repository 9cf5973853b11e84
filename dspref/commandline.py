"""What all commands share: the app, their arguments, and that a mistake is one line with its exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import dspref
from dspref.errors import ConfigError, ExitCode, UserError, unloadable
from dspref.terminal import outlive_streams, shown


class Commands(TyperGroup):
    """The commands; a mistake in the command line is one line, as any other, and not a box of several."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        outlive_streams()
        try:
            os.getcwd()
        except FileNotFoundError:
            print("the folder that you are in has been deleted; cd into one that is there", file=sys.stderr)
            sys.exit(ExitCode.ENVIRONMENT)
        try:
            code = super().main(*args, standalone_mode=False, **extra)
        except Exception as error:
            if not standalone_mode or not hasattr(error, "format_message"):
                raise  # a bug: the fault of a user, or of a disk, is said where the command is
            code = tell_misuse(error)
        if standalone_mode:
            sys.exit(code or 0)
        return code


def tell_misuse(error: Any) -> int:
    """Say what is wrong with a command line. A command that was given nothing at all shows its help."""
    context = error.ctx if hasattr(error, "ctx") else None
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message(), end="")  # empty where it has been printed in colours, when the error was made
        return int(error.exit_code)
    path = context.command_path if context else "dspref"
    said = " ".join(error.format_message().split()).removesuffix(".").removeprefix("Invalid value: ")
    print(ConfigError(f"{path}: {said}; see {path} --help"), file=sys.stderr)
    return int(error.exit_code)


class OfRun(TyperCommand):
    """A command whose first argument is a run's YAML file, which may also be given as `--config X.yaml`, as launch/train.py
    takes it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for at, word in enumerate(args):
            if word == "--config" and at + 1 < len(args):
                args = [args[at + 1], *args[:at], *args[at + 2 :]]
                break
            if word.startswith("--config="):
                args = [word.removeprefix("--config="), *args[:at], *args[at + 1 :]]
                break
        if "--config" in args:
            raise typer.BadParameter("--config: the path of a YAML file is missing behind it", ctx)
        known = {"--help", *(name for option in self.params for name in (*option.opts, *option.secondary_opts))}
        for word in args[: args.index("--") if "--" in args else None]:
            if word.startswith("--") and word.partition("=")[0] not in known:
                remedy = "a value of the run is changed by section.key=value, without dashes"
                raise typer.BadParameter(f"{word}: no such option; {remedy}", ctx)
        return super().parse_args(ctx, args)


@contextmanager
def faults_in_one_line() -> Iterator[None]:
    """A user's mistake, a disk's, or a library's that does not load, becomes one line and its exit code."""
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
    except Exception as error:
        if (fault := unloadable(error)) is None:
            raise
        print(fault, file=sys.stderr)
        raise typer.Exit(int(fault.exit_code)) from None


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


def expanded(name: str | None) -> str | None:
    """As `whole`, of what may be a folder or an id of the hub."""
    found = whole(Path(name)) if name else None
    return str(found) if found else name


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
AlsoFile = Annotated[Path | None, typer.Argument(metavar="[X.yaml]", help="Also check what this run needs.", callback=whole)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Values that replace the file's.")
]


class Format(StrEnum):
    text = "text"
    json = "json"


def tell_repeated(overrides: list[str] | None) -> None:
    """An override that a later one replaces is said, as it may be a slip."""
    from dspref.config import repeated

    for line in repeated(overrides or []):
        print(line, file=sys.stderr)
