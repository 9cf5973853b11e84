"""How a command line is read: mistakes in one line, and the file of a run as the launcher takes it too."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from dspref.errors import ConfigError
from dspref.terminal import outlive_streams


class Commands(TyperGroup):
    """The commands; a mistake in the command line is one line, as any other, and not a box of several."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        outlive_streams()
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
