"""What can go wrong for a user, each kind with its exit code.

A `UserError` is shown as its message, without a traceback; any other exception is a bug in dspref.
This module is below every layer and imports of dspref only `secrets` and `terminal`.
"""

from __future__ import annotations

import errno
import traceback
from enum import IntEnum

from dspref.secrets import redact
from dspref.terminal import shown

# A write that fails so need not name its file.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ExitCode(IntEnum):
    """The process exit codes; SLURM scripts branch on them, so they never change meaning."""

    DONE = 0
    BUG = 1
    CONFIG = 2
    DATA = 3
    ENVIRONMENT = 4
    NUMERIC = 5
    HANG = 6
    IO = 7
    INTERRUPTED = 75
    CTRL_C = 130


class UserError(Exception):
    """Something the user can mend. The message is one line: where, what, and how to mend it."""

    exit_code: ExitCode = ExitCode.BUG

    def __init__(self, message: str) -> None:
        super().__init__(shown(redact(message)))  # it may quote a value, a URL, or what a library said


class ConfigError(UserError):
    """The YAML file, an override or the command line is wrong. The message may hold several lines, one for each fault."""

    exit_code = ExitCode.CONFIG


class DataError(UserError):
    """The data set is wrong. The message may hold several lines, one for each bad row."""

    exit_code = ExitCode.DATA


class EnvironmentFault(UserError):
    """The machine lacks something the run needs: a package, a GPU, a free folder."""

    exit_code = ExitCode.ENVIRONMENT


class NumericFault(UserError):
    """The numbers went wrong: a non-finite loss, or a first step that misses its analytic value."""

    exit_code = ExitCode.NUMERIC


class IOFault(UserError):
    """Reading or writing failed during the run."""

    exit_code = ExitCode.IO


class Interrupted(BaseException):
    """Somebody asked the run to stop, and what it had is committed: started again, it goes on.

    As KeyboardInterrupt, it comes between any two instructions, and is no `Exception`: what a library or a check here
    catches as a fault of its own must not be this.
    """

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.INTERRUPTED) -> None:
        super().__init__(shown(redact(message)))
        self.exit_code = exit_code


class Relayed(UserError):
    """A fault that another rank has already reported: this rank leaves with the same exit code, silently."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("reported by another rank")
        self.exit_code = ExitCode(exit_code)


def exit_code_of(error: BaseException) -> ExitCode:
    """What a process that ends by this error returns."""
    if isinstance(error, UserError | Interrupted):
        return error.exit_code
    if isinstance(error, OSError) and (error.filename or error.errno in NO_ROOM):
        return ExitCode.IO  # another without a name is of a library's own making
    return ExitCode.CTRL_C if isinstance(error, KeyboardInterrupt) else ExitCode.BUG


def unloadable(error: BaseException) -> EnvironmentFault | None:
    """The fault of a machine that an exception, or what it comes from, tells of: a library that is not there, or raises
    where it is loaded. Who has installed packages that do not fit together meets it at any import."""
    found = None
    told: BaseException | None = error
    while told is not None:
        found, told = _unloadable(told) or found, told.__cause__  # transformers wraps what its imports raise
    return found


def _unloadable(error: BaseException) -> EnvironmentFault | None:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    loaded = [str(frame.f_globals.get("__name__")) for frame in frames if frame.f_code.co_name == "<module>"]
    named = [error.name] if isinstance(error, ImportError) and error.name else []
    foreign = [name for name in (*loaded, *named) if name.partition(".")[0] not in ("dspref", "__main__")]
    if not foreign:
        return None
    package, said = foreign[0].partition(".")[0], " ".join(str(error).split()) or type(error).__name__
    remedy = "install what constraints.txt names"
    if "torchvision::" in said:  # kernels that have been built for another torch, as PyPI's have for a torch of CPUs alone
        remedy = "install torchvision from the index that torch came from, or pip uninstall torchvision"
    return EnvironmentFault(f"{package} cannot be loaded: {said.removesuffix('.')}; {remedy}")
