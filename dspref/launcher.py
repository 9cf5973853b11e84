"""From the command line to `train`, and from an exception to an exit code. Loads torch only once the config is good, and
itself nothing that takes long, so that signals have their exit codes from the first moment.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
import traceback
from collections.abc import Callable, MutableMapping, Sequence
from typing import NoReturn, TextIO

from dspref.errors import ConfigError, ExitCode, Interrupted, UserError, exit_code_of
from dspref.secrets import redact
from dspref.terminal import outlive_streams, shown
from dspref.watch.interruption import BEFORE_RUN, catch_to_the_end, decided, first_rank, leaving_at_once

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
    try:
        with leaving_at_once():
            job = job_of(arguments)
    except UserError as error:
        # Every rank finds the same fault in the same file; one says so.
        if first_rank(os.environ):
            print(error, file=sys.stderr, flush=True)
        else:
            time.sleep(WORD_SECONDS)
        return int(error.exit_code)
    catch_to_the_end()
    return guarded(job)


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
    from dspref import distributed

    try:
        job()
        decided(ExitCode.DONE)
        distributed.finish()
    except distributed.Relayed as error:
        return decided(int(error.exit_code))
    except (UserError, Interrupted) as error:
        decided(int(error.exit_code))
        if distributed.first_to_say(str(error)):
            print(error, file=terminal, flush=True)
        return int(error.exit_code)
    except OSError as error:
        if exit_code_of(error) is not ExitCode.IO:  # of a library's own making: a bug, shown as one
            return report_bug(terminal)
        decided(int(ExitCode.IO))
        remedy = remedy_of(error)
        fault = shown(redact(f"{error.filename or 'a file of the run'}: {error.strerror}; {remedy}"))
        if distributed.first_to_say(fault):
            print(fault, file=terminal, flush=True)
        return int(ExitCode.IO)
    except KeyboardInterrupt:
        return decided(int(ExitCode.CTRL_C))
    except Exception:
        return report_bug(terminal)
    return int(ExitCode.DONE)


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
