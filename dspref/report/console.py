"""What a person sees: the banner, one progress bar on a terminal (plain lines elsewhere), the closing summary.

Text that comes from data is shown as text: no markup, no control characters.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from dspref import distributed
from dspref.files import write_atomically
from dspref.report.performance import PHASES
from dspref.run import record, status
from dspref.run.folder import RunFolder
from dspref.run.history import Sample
from dspref.secrets import redact
from dspref.terminal import columns, duration, printable, shown

# metric name -> its short form.
ON_TERMINAL = {"loss": "loss", "rewards/accuracies": "acc", "rewards/margins": "margin"}
# What the bar has beside it, the first ones on a narrow terminal.
BESIDE_BAR = ("loss", "learning_rate", "perf/tokens_per_second", "grad_norm", "rewards/accuracies", "rewards/margins")
# After what time, and how often, a scoring says how far it is in lines; how often in the run folder.
TELL_AFTER_SECONDS, TELL_EVERY_SECONDS, WRITE_EVERY_SECONDS = 3.0, 20.0, 5.0
# Answers that are shown when they are given, and at the end.
SHORTLY, AT_THE_END = 2, 8
NARROW, PLAIN_WIDTH = 80, 120
IN_LINES = ON_TERMINAL | {"nll_loss": "nll", "grad_norm": "grad", "learning_rate": "lr"}
SPEED = "perf/tokens_per_second"
# Of the banner, what is not needed by everyone: the log file has it.
IN_LOG = ("scored", "packs")
# Steps whose mean time the time left is told by.
STEPS_TIMED = 50
BAR_WIDTH = 8
LEFT = "{task.fields[left]} "


def now() -> float:
    return time.monotonic()


def banner(rows: Mapping[str, str], brief: str | None = None) -> None:
    """The run in a few lines, before anything slow happens; all of them in the log file. `brief`: one line instead."""
    width = max(map(len, rows))
    lines = {name: f"{name:<{width}}  {printable(text)}" for name, text in rows.items()}
    distributed.note("\n".join(lines.values()))
    if distributed.world().rank == 0:
        told = [line for name, line in lines.items() if name not in IN_LOG] if brief is None else [printable(brief, 400)]
        print(redact("\n".join(told)), flush=True)


def first_pair(text: str) -> None:
    """A pair as text, scored tokens between brackets, in the log file; `dspref inspect` shows any other."""
    if distributed.world().rank == 0:
        distributed.note(f"the first pair, scored tokens in [[ ]]\n{text}")


class ProgressView:
    """One bar on a terminal; a line per logged step anywhere else, never a carriage return. The log file has the lines
    either way."""

    def __init__(self, done: int, total: int) -> None:
        self._total = total
        self._bar: Progress | None = None
        self._ends = deque([(done, now())], maxlen=STEPS_TIMED + 1)
        if distributed.world().rank == 0 and sys.stdout.isatty():
            count = MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=2 * len(str(total)) + 1))
            left, figures = (TextColumn(text, table_column=Column(no_wrap=True)) for text in (LEFT, "{task.description}"))
            self._bar = Progress(TextColumn("step"), count, BarColumn(bar_width=BAR_WIDTH), left, figures, console=Console())
            self._task = self._bar.add_task("", total=total, completed=done, left="")
            self._bar.start()

    def begin(self) -> None:
        """What came before the steps is over: their time begins."""
        self._ends[0] = (self._ends[0][0], now())

    @property
    def seconds_left(self) -> float | None:
        """By the mean time of the last steps, with what was done between them; None before the first step."""
        (first, began), (last, ended) = self._ends[0], self._ends[-1]
        return (ended - began) / (last - first) * (self._total - last) if last > first else None

    def advance(self, step: int) -> None:
        if step > self._ends[-1][0]:
            self._ends.append((step, now()))
        if self._bar:
            self._bar.update(self._task, completed=step, left=self._left())

    def show(self, step: int, record: Mapping[str, float]) -> None:
        """The figures of a logged step that is done."""
        self.advance(step)
        figures = {name: f"{short} {record[name]:.4g}" for name, short in IN_LINES.items() if name in record}
        figures[SPEED] = f"{record[SPEED]:,.0f} tok/s" if SPEED in record else "profiled"
        left = self._left()
        line = f"step {step}/{self._total}  {'  '.join([*figures.values(), *([left] if left else [])])}"
        if self._bar:
            distributed.note(line)
            taken = len(f"step {self._total}/{self._total}   {left}  ") + BAR_WIDTH
            beside = within([figures[name] for name in BESIDE_BAR if name in figures], self._bar.console.width - taken)
            self._bar.update(self._task, completed=step, description=beside)
        else:
            distributed.log(line, stamp=True)

    def _left(self) -> str:
        seconds = self.seconds_left
        return f"{duration(seconds)} left" if seconds is not None and self._ends[-1][0] < self._total else ""

    def note(self, text: str) -> None:
        """A line between the steps: an evaluation, a checkpoint."""
        if self._bar:
            distributed.note(text)
            self._bar.console.print(Text(shown(text)))
        else:
            distributed.log(text)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def within(figures: Sequence[str], width: int) -> str:
    """So many of the first figures, at least one, as a terminal has columns for."""
    count = max((n for n in range(1, len(figures) + 1) if len("  ".join(figures[:n])) <= width), default=1)
    return "  ".join(figures[:count])


@contextlib.contextmanager
def scoring(run: RunFolder | None = None) -> Iterator[Callable[[int, int, float | None], None]]:
    """A view of the scoring of a reference store, for (pairs scored, pairs to score, seconds left): one bar on a terminal, a
    line now and then anywhere else, and for a run a file in its folder while that lasts, for `dspref status`, and an event.
    Nothing is shown before the first call."""
    view = _ScoringView(run.path if run else None)
    try:
        yield view.show
    finally:
        view.close()
        if run and view.done:
            run.event("scored", pairs=view.done)


class _ScoringView:
    def __init__(self, folder: Path | None) -> None:
        self._file = folder / status.SCORING if folder and distributed.world().rank == 0 else None
        self._bar: Progress | None = None
        self._told = self._written = 0.0
        self.done = 0
        self._forget()  # what a run that was killed has left

    def show(self, done: int, total: int, seconds_left: float | None) -> None:
        self.done = done
        if distributed.world().rank == 0 and sys.stdout.isatty():
            self._draw(done, total, seconds_left)
        elif not self._told:
            self._told = time.monotonic() - TELL_EVERY_SECONDS + TELL_AFTER_SECONDS
            distributed.note(f"reference: {total:,} pairs to score")
        elif time.monotonic() - self._told > TELL_EVERY_SECONDS:
            self._told = time.monotonic()
            left = f", about {duration(seconds_left)} left" if seconds_left is not None else ""
            distributed.log(f"reference: scored {done:,} of {total:,} pairs so far{left}", stamp=True)
        if self._file and (not done or time.monotonic() - self._written > WRITE_EVERY_SECONDS):
            self._written = time.monotonic()
            with contextlib.suppress(OSError):  # a full disk is told by what must be written
                write_atomically(self._file, json.dumps({"done": done, "total": total, "seconds_left": seconds_left}))

    def _draw(self, done: int, total: int, seconds_left: float | None) -> None:
        if self._bar is None:
            figures = TextColumn("{task.description}", table_column=Column(no_wrap=True))
            count = MofNCompleteColumn(table_column=Column(no_wrap=True))
            self._bar = Progress(
                TextColumn("reference: scoring"), count, TextColumn("pairs"), BarColumn(bar_width=16), figures,
                console=Console(), transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=total)
            self._bar.start()
        left = f"about {duration(seconds_left)} left" if seconds_left is not None else ""
        self._bar.update(self._task, completed=done, description=left)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
        self._forget()

    def _forget(self) -> None:
        if self._file:
            with contextlib.suppress(OSError):
                self._file.unlink(missing_ok=True)


def evaluation_line(step: int, record: Mapping[str, float], prefixes: Sequence[str]) -> str:
    """One evaluation, each held-out set behind its name."""
    sets = []
    for prefix in prefixes:
        found = {short: record[prefix + name] for name, short in ON_TERMINAL.items() if prefix + name in record}
        sets.append(f"{prefix.rstrip('_')}  {'  '.join(f'{short} {value:.4g}' for short, value in found.items())}")
    return f"step {step}: {'; '.join(sets)}"


def summary(run_summary: Mapping[str, Any], where: Mapping[str, str], next_commands: Sequence[str]) -> None:
    """What was learned, where the model is, what to run next."""
    if distributed.world().rank != 0:
        return
    console = Console(width=columns(PLAIN_WIDTH), highlight=False)
    console.print(Text(_length_in_words(run_summary)), soft_wrap=True)
    table = Table(box=None)
    table.add_column("")
    table.add_column("first logged", justify="right")
    table.add_column(_tail_in_words(run_summary), justify="right")
    for name, (first, last) in run_summary["learned"].items():
        table.add_row(Text(shown(name)), _figure(first), _figure(last))
    console.print(table)
    if stopped := run_summary.get("stopped"):
        console.print(Text(shown(f"stopped {stopped}")), soft_wrap=True)
    for warning in run_summary.get("warnings") or ():
        console.print(Text(f"warning: {warning}"), soft_wrap=True)
    with suppress(KeyError, TypeError):  # of a metrics.jsonl that was damaged any may be missing
        where = {**speed_in_words(run_summary["speed"]), **where}
    for name, text in where.items():
        console.print(Text(shown(f"{name:<8}{text}")), soft_wrap=True)
    # One line each, however narrow the terminal: a command is there to be copied.
    console.print(Text(shown("next    " + "\n        ".join(next_commands))), soft_wrap=True)


def _length_in_words(run_summary: Mapping[str, Any]) -> str:
    """Of a run that was started once, its time; of another, that of its steps, which lie in several starts."""
    steps, seconds, starts = run_summary["step"], run_summary["seconds"], run_summary.get("starts") or 1
    if starts == 1:
        return f"{steps} steps in {seconds:.0f} s"
    in_steps = run_summary.get("seconds_in_steps") or seconds
    return f"{steps} steps, {in_steps:.0f} s in them, over {starts} starts; the last start took {seconds:.0f} s in all"


def _tail_in_words(run_summary: Mapping[str, Any]) -> str:
    steps, evaluates = run_summary.get("tail") or 1, any(name.startswith("eval_") for name in run_summary["learned"])
    if steps == 1:
        return "last"
    return f"mean of the last {steps} logged" + ("; eval: the last" if evaluates else "")


def speed_in_words(speed: Mapping[str, float]) -> dict[str, str]:
    """Medians of the `perf/*` metrics -> what a person wants to know of them."""
    rates = (("tokens", "real"), ("response_tokens", "scored"), ("computed_tokens", "computed"))
    figures = [", ".join(f"{speed[f'{name}_per_second']:,.0f} {word}" for name, word in rates) + " tokens/s"]
    if "tflops_per_rank" in speed:
        figures.append(f"{speed['tflops_per_rank']:.3g} TFLOP/s per rank")
    if "mfu" in speed:
        figures.append(f"MFU {speed['mfu']:.1%} ({speed['hfu']:.1%} with recomputation and reference)")
    figures += [f"packs {speed['pack_fill']:.0%} full", f"peak memory {speed['memory_gib']:.1f} GiB"]
    phases = {name: speed.get(f"{name}_seconds", 0) for name in PHASES}
    total = sum(phases.values()) or 1
    shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in phases.items())
    return {"speed": "; ".join(figures), "time": f"{speed['seconds']:.3g} s a step: {shares}"}


def sample_lines(step: int, rows: Sequence[Mapping[str, Any]]) -> str:
    """The answers of a step; the first of them in a line each, or in three where that is too long for a narrow terminal."""
    lines = [f"step {step}: {len(rows)} answer{'s' * (len(rows) != 1)} in {record.SAMPLES}"]
    for row in rows[:SHORTLY]:
        prompt, (policy, reference) = _short(asked(row["prompt"]), 64), apart(row["policy"], row["reference"], 64)
        reference = "the same" if row["policy"] == row["reference"] else reference
        line = f"  {prompt}  ->  {policy}  (reference: {reference})"
        lines.append(line if len(line) < NARROW else f"  {prompt}\n    ->  {policy}\n    reference: {reference}")
    return "\n".join(lines)


def asked(prompt: str) -> str:
    """What the user said last, of a prompt in which roles have lines of their own (ChatML, Gemma): shortened, it
    would else be the system message. Any other prompt as it is."""
    _, header, turn = f"\n{prompt}".rpartition("\nuser\n")
    said = re.split(r"\n(?:assistant|model)\n", turn)
    return said[0].strip() if header and len(said) == 2 and said[0].strip() else prompt


def _short(text: str, limit: int) -> str:
    return printable(" ".join(text.split()), limit) or "(nothing)"


def apart(one: str, other: str, limit: int) -> tuple[str, str]:
    """Two texts in one line of at most `limit` characters each: from their beginnings, or where these would look the same
    though the texts are not, from a little before they part."""
    texts = [" ".join(text.split()) for text in (one, other)]
    same = len(os.path.commonprefix(texts))
    if texts[0] != texts[1] and same >= limit - 1:
        texts = [f"…{text[same - limit // 3 :]}" for text in texts]
    return _short(texts[0], limit), _short(texts[1], limit)


def samples(rows: Sequence[Sample]) -> None:
    """The newest answers beside the reference's and the preferred one."""
    table = Table(title="Prompts, answered by reference and policy", title_justify="left", show_lines=False)
    for name in ("prompt", "reference", "policy", "chosen"):
        table.add_column(name, overflow="fold", max_width=44)
    for row in rows[:AT_THE_END]:
        answers = row.reference, row.policy
        if row.reference and row.policy:
            answers = apart(row.reference, row.policy, 80)
        texts = (asked(row.prompt), *answers, row.chosen)
        table.add_row(*(Text("-" if text is None else printable(text, limit=80)) for text in texts))
    console = Console(width=columns(PLAIN_WIDTH))
    console.print(table)
    if len(rows) > AT_THE_END:
        console.print(Text(f"and {len(rows) - AT_THE_END} more in {record.SAMPLES}"))


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
