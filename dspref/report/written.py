"""A report in the form that is asked for, to a file or to standard output."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from dspref.errors import ConfigError
from dspref.files import write_atomically
from dspref.report import page, plots, tables
from dspref.run import history
from dspref.run.history import History

FORMS: dict[str, Callable[[Sequence[History]], str | bytes]] = {
    "html": page.render,
    "png": plots.render,
    "md": tables.markdown,
    "csv": tables.long_form,
}
# What is text to paste or to pipe goes to standard output unless a file is named.
TO_FILE = ("html", "png")
SUFFIXES = {".html": "html", ".htm": "html", ".png": "png", ".md": "md", ".markdown": "md", ".csv": "csv"}


def report(folders: Sequence[Path], output: Path | None, form: str | None) -> tuple[str, Path | None]:
    """(the text for standard output, "" where a file was written; that file). Raises ConfigError for a folder without a run
    and for a file that cannot be one, before anything is written."""
    form, output = target(output, form)
    runs = history.read_all(folders)
    made = FORMS[form](runs)
    if output is None:
        return str(made), None
    write_atomically(output, made)
    return "", output


def target(output: Path | None, form: str | None) -> tuple[str, Path | None]:
    """The form and the file, of which each may tell the other."""
    if output is None:
        form = form or "html"
        output = Path(f"report.{form}") if form in TO_FILE else None
    else:
        told = SUFFIXES.get(output.suffix.lower())
        if told is None:
            raise ConfigError(f"-o {output}: must end in .html, .png, .md or .csv")
        if form not in (None, told):
            raise ConfigError(f"-o {output}: is the name of no {form} file; use -o {output.with_suffix(f'.{form}')}")
        form = told
    if output and not os.path.isdir(output.parent):
        raise ConfigError(f"-o {output}: there is no folder {output.parent}; make it, or name another")
    if output and os.path.isdir(output):
        raise ConfigError(f"-o {output}: is a folder; name a file")
    return form, output
