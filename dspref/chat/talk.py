"""Prompts in, answers out: a conversation on a terminal, or a prompt a line between pipes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dspref.chat import choice
from dspref.chat.speaker import Messages, Speaker
from dspref.data import vocabulary
from dspref.data.image_files import opened, placed_at
from dspref.data.image_rows import COLUMNS, NO_IMAGES, column_of, mark_of, without_images
from dspref.data.messages import messages_of
from dspref.data.rows import RowError, kind_of, strings, unsound, what_is
from dspref.errors import ConfigError, DataError
from dspref.model import adapters, loading
from dspref.model.generation import Asked
from dspref.terminal import printable, shown
from dspref.training import named
from dspref.watch.interruption import interruptible

HELP = "/reset begins anew, /quit or Ctrl-D leaves, Ctrl-C stops an answer, /help says this"
HELP_SEEING = f"/image PATH shows an image with your next message, {HELP}"


def chat(
    names: Sequence[str], asked: Asked, system: str | None, save: Path | None, seed: int | None, as_rows: bool = False
) -> None:
    """Talk to one model, or to two; `names`: of runs, checkpoints, folders or hub ids. `save`: where choices go; `as_rows`:
    between pipes, answers are rows of JSON.

    Raises ConfigError where a model cannot be had, or choices not be made or kept.
    """
    import torch

    typed = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    if as_rows and typed:
        raise ConfigError("--json: is for prompts from a pipe or a file; dspref chat MODEL --json < prompts.txt")
    if save is not None:
        refuse_unkept(save, len(names), typed)
    loading.quiet()
    if seed is not None:
        torch.manual_seed(seed)
    with ExitStack() as stack:
        found = [stack.enter_context(named.opened(name, option)) for name, option in zip(names, ("", "--versus"))]
        folders = tokenizers_of(found)
        speakers = []
        for one, folder in zip(found, folders):
            tokenizer = vocabulary.load_as_written(folder, one.trust_remote_code)
            speakers.append(Speaker.load(one.folder, tokenizer, one.trust_remote_code, asked, folder))
        stack.enter_context(interruptible())
        if system and not all(speaker.converses for speaker in speakers):
            raise ConfigError("--system: a model without a chat template continues texts; leave it out")
        talk = Talk(list(names), speakers, system, save, as_rows)
        (talk.typed if typed else talk.piped)()


def tokenizers_of(found: Sequence[named.Named]) -> list[str]:
    """Where each model's tokenizer lies: with it, with the model below an adapter, or else with the other model that is
    talked to, which began as this one. Raises ConfigError where there is none."""
    places = [found_with(one) for one in found]
    known = [place for place in places if place]
    if not known:
        raise ConfigError(f"{found[0].folder}: holds no tokenizer; save one there, or give a run")
    return [place or known[0] for place in places]


def found_with(one: named.Named) -> str | None:
    for folder in (one.folder, adapters.base_of(one.folder)[0] if one.is_adapter else None):
        if folder and (not os.path.isdir(folder) or vocabulary.has_tokenizer(folder)):
            return folder
    return None


def refuse_unkept(save: Path, count: int, typed: bool) -> None:
    if count < 2:
        raise ConfigError("--save: keeps which of two answers is better; name the other model by --versus")
    if not typed:
        raise ConfigError("--save: which answer is better is a key pressed on a terminal; leave it out between pipes")
    if not save.absolute().parent.is_dir():
        raise ConfigError(f"--save: {save.parent}: no such folder; make it first")
    open(save, "ab").close()  # a file that cannot be written is told now


@dataclass
class Talk:
    """One conversation, with one model or two."""

    names: list[str]
    speakers: list[Speaker]
    system: str | None
    save: Path | None
    as_rows: bool = False
    messages: Messages = field(default_factory=list)
    attached: list[str] = field(default_factory=list)
    """Paths of images that go with the next message."""
    kept: int = 0

    def begin(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.attached = []

    # ---------------------------------------------------------------------------------------------------- between pipes

    def piped(self) -> None:
        """Each line is a prompt of its own; its answer a block with an empty line behind it, or a row of JSON, and then a
        prompt may be one too, with `images`. What is no answer goes to standard error. Raises DataError behind the last
        line, where some had no room for an answer, or an image that cannot be read."""
        refused = unread = 0
        for number, line in lines_of_pipe():
            if not line:
                print(f"line {number}: is empty, and not asked", file=sys.stderr)
                continue
            self.begin()
            row = (row_in(line) if self.as_rows else None) or {"prompt": line}
            answers: list[str | None] = []
            try:
                for speaker in self.speakers:
                    text = "".join(speaker.answer(*self.asked(row)))
                    answers.append(None if is_full(speaker.ending) else text)
                    if not text.strip():
                        print(f"line {number}: {speaker.ending or 'the answer is empty'}", file=sys.stderr)
                refused += None in answers
            except RowError as error:
                print(shown(f"line {number}: {error.field}: {error.reason}"), file=sys.stderr)
                unread += 1
                answers = [None for _ in self.speakers]
            if self.as_rows:
                print(json.dumps({"line": number, **row, "answers": answers}), flush=True)
            else:
                numbers = [f"{k}: " if len(answers) > 1 else "" for k in range(1, len(answers) + 1)]
                print(shown("\n".join(n + (text or "") for n, text in zip(numbers, answers))), end="\n\n", flush=True)
        said = [f"{refused} prompt{'s' * (refused != 1)} had no room for an answer; shorten them"] * bool(refused)
        said += [f"{unread} prompt{'s' * (unread != 1)} could not be read; mend them"] * bool(unread)
        if said:
            raise DataError("; ".join(said))

    def asked(self, row: Mapping[str, Any]) -> tuple[Messages, Sequence[Any]]:
        """The conversation of a row without answers, and the images beside it. Raises RowError."""
        prompt, system = row.get("prompt"), row.get("system")
        if kind_of(prompt) == "other" or not prompt:
            raise RowError("prompt", f"{what_is(prompt)}, and no text and no messages")
        if row.get("tools"):
            raise RowError("tools", "not read here")
        if fault := next(filter(None, map(unsound, strings([prompt, system]))), None):
            raise RowError("prompt", fault)
        if isinstance(prompt, str):
            turns = [{"role": "user", "content": without_images(prompt)}]
        else:
            turns = messages_of(prompt, "prompt")
        before = [{"role": "system", "content": system}] if isinstance(system, str) and system else self.messages
        return [*before, *turns], column_of(row, {}).get("images", ())

    # ---------------------------------------------------------------------------------------------------- on a terminal

    def typed(self) -> None:
        for k, (name, speaker) in enumerate(zip(self.names, self.speakers), start=1):
            number = f"{k}  " if len(self.names) > 1 else ""
            print(shown(f"{number}{name}: {speaker.in_words()}"))
            if not speaker.converses:
                print("   it has no chat template: what you type is continued as text, each line by itself")
        print(self.help)
        self.begin()
        with suppress(EOFError):
            for line in lines_of_terminal():
                if line == "/quit":
                    break
                if not self.obeyed(line):
                    self.turn(line)
        print()
        if self.save and self.kept:
            print(shown(f"{self.kept} row{'s' * (self.kept != 1)} added to {self.save}"))

    @property
    def help(self) -> str:
        return HELP_SEEING if all(speaker.sees for speaker in self.speakers) else HELP

    def obeyed(self, line: str) -> bool:
        """Whether a line is a command, and was done."""
        name, _, rest = line.partition(" ")
        if line == "/help":
            print(self.help)
        elif line == "/reset":
            self.begin()
            print("begun anew")
        elif name == "/image":
            self.attach(rest.strip())
        else:
            return False
        return True

    def attach(self, said: str) -> None:
        """Have an image go with the next message; where it cannot be read, say so."""
        bare = said[1:-1] if said[:1] in ("'", '"') and said[-1:] == said[:1] else said  # as terminals drop files
        try:
            if not bare:
                raise RowError("images", "no file is named; /image PATH")
            if not all(speaker.sees for speaker in self.speakers):
                raise NO_IMAGES
            path = placed_at(bare, Path.cwd(), bare)
            image = opened(path, bare)
        except RowError as error:
            print(shown(f"(not attached: {error.reason})"))
            return
        self.attached.append(str(path))
        print(shown(f"({path.name}, {image.width} x {image.height}, goes with your next message)"))

    def turn(self, line: str) -> None:
        marks = "".join(mark_of({"image": path}, "image") for path in self.attached)
        asked = [*self.messages, {"role": "user", "content": marks + without_images(line)}]
        try:
            answer = self.single(asked) if len(self.speakers) == 1 else self.double(asked)
        except (ConfigError, RowError) as error:  # a template's refusal; an image that has gone
            print(shown(str(error)))
            return
        if answer:
            self.messages, self.attached = [*asked, {"role": "assistant", "content": answer}], []

    def single(self, asked: Messages) -> str:
        """Show the answer as it grows; what was said of it."""
        said = []
        print("model> ", end="", flush=True)
        ending = ""
        try:
            for piece in self.speakers[0].answer(asked):
                said.append(piece)
                print(shown(piece), end="", flush=True)
        except KeyboardInterrupt:
            ending = "stopped"
        tell(ending or self.speakers[0].ending, "/reset")
        return "".join(said)

    def double(self, asked: Messages) -> str:
        """Show both answers, and ask which is better where that is kept; the one that the conversation goes on with."""
        from dspref.chat.sides import Sides

        answers, endings = ["", ""], ["", ""]
        with Sides([f"{k}  {name}" for k, name in enumerate(self.names, start=1)]) as sides:
            for k, speaker in enumerate(self.speakers):
                try:
                    for piece in speaker.answer(asked):
                        answers[k] += piece
                        sides.add(k, piece)
                    endings[k] = speaker.ending
                except KeyboardInterrupt:
                    endings[k] = "stopped"
        for k, ending in enumerate(endings, start=1):
            if ending:
                print(f"({k} {ending})")
        return answers[self.better(asked, answers) or 0]

    def better(self, asked: Messages, answers: list[str]) -> int | None:
        """Ask which answer is better, and keep it; None where nobody says."""
        if self.save is None:
            return None
        if reason := choice.refusal(answers):
            print(f"(not kept: {reason})")
            return None
        try:
            key = choice.pressed("which is better? 1, 2, or s to skip: ", list(choice.KEYS))
        except KeyboardInterrupt:
            key = "s"
        print(key or "")
        if key is None:
            raise EOFError
        better = choice.KEYS[key]
        if better is not None:
            row = choice.row_of(asked, answers[better], answers[1 - better], self.speakers[better].converses)
            choice.keep(self.save, row)
            self.kept += 1
        return better


def tell(ending: str, remedy: str) -> None:
    more = f"; {remedy}" if is_full(ending) else ""
    print(f" ({printable(ending)}{more})" if ending else "", flush=True)


def row_in(line: str) -> dict[str, Any] | None:
    """The row that a line is, with a prompt or images; None for a text, which may look much the same."""
    try:
        found = json.loads(line) if line.startswith("{") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not found.keys() & {"prompt", *COLUMNS}:
        return None
    return {name: found[name] for name in ("prompt", "system", "tools", *COLUMNS) if name in found}


def is_full(ending: str) -> bool:
    """Whether an answer was not begun, as the prompt left no room for it."""
    return ending.startswith("no room")


def lines_of_pipe() -> Iterator[tuple[int, str]]:
    """(number, text) of each line; bytes that are no UTF-8 are replaced."""
    if sys.stdin is None:
        return
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    for number, line in enumerate(sys.stdin, start=1):
        yield number, line.strip()


def lines_of_terminal() -> Iterator[str]:
    """What is typed, but empty lines. Raises EOFError at Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401  (arrow keys, and what was typed before)
    while True:
        try:
            text = input("you> ").strip()
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)")
            continue
        except UnicodeDecodeError:
            print("(not UTF-8; not read)")
            continue
        if text:
            yield text
