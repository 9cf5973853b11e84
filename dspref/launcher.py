"""From the command line to `train`, and from an exception to an exit code. Loads torch only once the config is good, and
itself nothing that takes long, so that signals have their exit codes from the first moment.
"""

from __future__ import annotations

import argparse
import errno
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, MutableMapping, Sequence
from typing import NoReturn, TextIO

from dspref.errors import ConfigError, ExitCode, Interrupted, IOFault, UserError, exit_code_of, unloadable
from dspref.secrets import redact
from dspref.terminal import outlive_streams, shown
from dspref.watch.interruption import BEFORE_RUN, catch_to_the_end, decided, first_of_host, first_rank, leaving_at_once

# A launcher ends all ranks once one has left: so long the others wait, that the first may say why.
WORD_SECONDS = 2.0
# What torch reads when it is loaded, where the user has not set it.
FOR_TORCH = {
    # When a rank dies, torch's sockets on all others would print a page of C++ frames over the line that says why.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    # Threads that wait for each other spin for milliseconds by default, on cores that the others need where something else
    # runs too. So many turns are some microseconds; docs/LOG.md has the figures.
    "GOMP_SPINCOUNT": "1000",
}
# How it keeps a GPU's memory, under both names that this has had: packs of all lengths in turn leave holes that no later
# tensor fits into, unless segments can grow. A user's own words, under either name, stay alone.
ALLOCATOR = dict.fromkeys(("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), "expandable_segments:True")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `train` on this rank and return the exit code, for a process that ends with it."""
    outlive_streams()
    prepare(os.environ)  # a loss of the user's own loads torch while the config is read
    try:
        with leaving_at_once():
            job = job_of(arguments)
    except UserError as error:
        return refused(error)
    catch_to_the_end()
    return guarded(job)


def refused(fault: UserError) -> int:
    """Say, before the ranks have met, what is wrong, and return the exit code.

    Every rank finds the same fault in the same file, and the first says so. Whoever is there still when the launcher should
    have ended all has found another, such as a file that is missing on one host; the first rank of each host says it.
    """
    if first_rank(os.environ):
        print(fault, file=sys.stderr, flush=True)
        return int(fault.exit_code)
    time.sleep(WORD_SECONDS)
    if first_of_host(os.environ):
        print("\n".join(f"{socket.gethostname()}: {line}" for line in str(fault).splitlines()), file=sys.stderr, flush=True)
    return int(fault.exit_code)


def job_of(arguments: Sequence[str] | None) -> Callable[[], None]:
    """The training that a command line asks for, its config checked. Raises UserError."""
    from dspref import config as configuration
    from dspref.ranks import rendezvous

    rendezvous.announce()
    options = parse(arguments)
    for line in configuration.repeated(options.overrides) if first_rank(os.environ) else ():
        print(line, file=sys.stderr, flush=True)
    config = configuration.load(options.config, options.overrides)
    source = configuration.shipped(configuration.expand(options.config))

    def job() -> None:
        from dspref.training.trainer import train

        train(config, source)

    return job


def guarded(job: Callable[[], None], what: str = BEFORE_RUN) -> int:
    """Do a job of all ranks, and return its exit code; a user's mistake is one line on the terminal and no traceback.
    `what`: was stopped, by a signal while the job has no watch of its own."""
    outlive_streams()
    prepare(os.environ)
    terminal = sys.stderr  # ranks other than 0 send their output to a log file later on
    with leaving_at_once():
        pass

    with leaving_at_once(what):
        return outcome(job, terminal)


def outcome(job: Callable[[], None], terminal: TextIO) -> int:
    """Do the job, say on the terminal what ended it, and return the exit code, which no signal changes from there on."""
    try:
        from dspref import distributed
    except Exception as error:
        fault = unloadable(error)
        return refused(fault) if fault else report_bug(terminal)

    try:
        job()
        decided(ExitCode.DONE)
        distributed.finish()
    except distributed.Relayed as error:
        return decided(int(error.exit_code))
    except (UserError, Interrupted) as error:
        fault = error
    except KeyboardInterrupt:
        return decided(int(ExitCode.CTRL_C))
    except Exception as error:
        if broken := unloadable(error):
            decided(int(broken.exit_code))
            return refused(broken)
        fault = failed_write(error)
        if fault is None:
            return report_bug(terminal)
    else:
        return int(ExitCode.DONE)
    decided(int(fault.exit_code))
    if distributed.first_to_say(str(fault)):
        # What a machine lacks, another may have.
        place = "" if distributed.world().beside_first else f"{socket.gethostname()}: "
        print(f"{place}{fault}", file=terminal, flush=True)
    return int(fault.exit_code)


def failed_write(error: Exception) -> IOFault | None:
    """The fault of a disk, where the exception is one of the system, and none of a library's own making."""
    if not isinstance(error, OSError) or exit_code_of(error) is not ExitCode.IO:
        return None
    return IOFault(f"{error.filename or 'a file of the run'}: {error.strerror}; {remedy_of(error)}")


def prepare(environment: MutableMapping[str, str]) -> None:
    """Set what torch reads when it is loaded, where the user has not."""
    for name, value in (FOR_TORCH if ALLOCATOR.keys() & environment.keys() else FOR_TORCH | ALLOCATOR).items():
        environment.setdefault(name, value)


def remedy_of(error: OSError) -> str:
    if error.errno == errno.ENAMETOOLONG:
        return "a name has at most 255 bytes: use a shorter one"
    return "free the space, mend the permissions, or use another output_dir="


def report_bug(terminal: TextIO) -> int:
    """Show the exception that is being handled, without the secrets that its message may hold; the exit code of a bug.

    Only one rank comes here: what follows from its end is not told by the others.
    """
    decided(int(ExitCode.BUG))
    for stream in {terminal, sys.stderr}:
        print(shown(redact(traceback.format_exc())), end="", file=stream, flush=True)
    return int(ExitCode.BUG)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; give --config X.yaml, and values as section.key=value")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="train.py", description="Preference optimization from one YAML file.", allow_abbrev=False)
    parser.add_argument("--config", metavar="X.yaml", help="the run; see launch/configs")
    # The deepspeed launcher puts this before the user's own arguments; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace those of the file")
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        word = " ".join(unknown[0].split())
        raise ConfigError(f"{word}: no such option; a value is changed by section.key=value, without dashes")
    if not options.config:
        raise ConfigError("--config: is missing; give the path of a YAML file, such as launch/configs/quickstart.yaml")
    return options
