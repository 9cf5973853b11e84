"""Configs of other trainers as flat keys and values: YAML, JSON or TOML files, Python scripts (`their_scripts`), shell
scripts, of which the longest command with `--key value` is read. Nothing is run.
"""

from __future__ import annotations

import errno
import json
import re
import shlex
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dspref import reading
from dspref.config.numbers import Shorthand, meant
from dspref.config.yaml12 import MAX_BYTES, Position, YamlError, parse, parse_text, parse_value
from dspref.convert.scripts import of_python
from dspref.convert.theirs import Theirs, flat
from dspref.errors import ConfigError

SHELL = (".sh", ".bash", ".sbatch", ".slurm")
PAIR = re.compile(r"(?<!\\)\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})", re.IGNORECASE)
TABLE, SETTING = re.compile(r"\s*\[\[?([\w.-]+)\]\]?"), re.compile(r"\s*[\"']?([\w.-]+)[\"']?\s*=")
LAUNCHERS = {
    "num_processes",
    "nproc_per_node",
    "num_gpus",
    "nproc-per-node",
    "config_file",
    "num_machines",
    "nnodes",
    "module",
    "standalone",
    "hostfile",
}
METHOD = re.compile(r"(?<![a-z])(orpo|simpo|cpo|dpo|kto|bco|tpo|sft|grpo|ppo|rm)(?![a-z])")
# Behind a launcher's options: `accelerate launch --num_processes 8 trl kto`, `deepspeed --module openrlhf.cli.train_kto`.
BEHIND_LAUNCHER = re.compile(r"(?:\btrl |openrlhf\.cli\.train_)(orpo|simpo|cpo|dpo|kto|bco|tpo|sft|grpo|ppo|rm)(?![a-z])")
SECRETS = {"use_wandb", "logger.wandb.key"}
ASSIGNED = re.compile(r"\s*(?:export\s+)?([A-Za-z_]\w*)=(\"[^\"$`]*\"|'[^']*'|[^\s\"'$`;&|]+)\s*$")


def read(path: Path, python: bool = False) -> Theirs:
    """A file by its kind. Raises ConfigError."""
    if (python and path.suffix not in SHELL) or path.suffix == ".py":
        try:
            with warnings.catch_warnings(action="ignore"):  # of the script's own escapes
                return of_python(_text(path), str(path))
        except RecursionError:
            raise ConfigError(f"{path}: nested too deeply to be read; give a YAML file") from None
    if path.suffix in SHELL:
        return of_shell(_text(path), str(path))
    if path.suffix == ".toml":
        return of_toml(_text(path), str(path))
    document, positions = _of_json(path) if path.suffix == ".json" else parse(path)
    lines = {".".join(map(str, key)): position.line for key, position in positions.items() if key}
    found = flat(document, lines, str(path))
    found.keys = {key: _as_there(value) for key, value in found.keys.items()}
    return found


def _of_json(path: Path) -> tuple[dict[str, Any], dict[tuple, Position]]:
    """JSON is YAML, but that tabs may stand between its tokens (within its texts they are escapes), and two escapes for one
    letter."""
    text = PAIR.sub(lambda pair: json.loads(f'"{pair[0]}"'), _text(path))
    try:
        return parse_text(text.replace("\t", " "), str(path))
    except ConfigError as error:
        raise ConfigError(str(error).replace("not valid YAML", "not valid JSON")) from None


def of_toml(text: str, where: str) -> Theirs:
    """A TOML file; its tables are groups of keys. Raises ConfigError."""
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid TOML: {' '.join(str(error).split())}") from None
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if found := TABLE.match(line):
            table = f"{found[1]}."
        elif found := SETTING.match(line):
            lines.setdefault(table + found[1], number)
    return flat(_plain(document), lines, where)


def _plain(node: Any) -> Any:
    """With dates, which no setting is, as text."""
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    return node if isinstance(node, str | int | float | bool) else str(node)


def _as_there(value: Any) -> Any:
    """A value as the YAML 1.1 of their loaders has it: `yes` is true, and `1_000` a number."""
    if isinstance(value, Shorthand) and "_" in value:
        number = meant(value, "")
        return value if number is None else number
    word = value.lower() if isinstance(value, str) else ""
    return word in ("yes", "on") if word in ("yes", "no", "on", "off") else value


def _text(path: Path) -> str:
    try:
        return reading.read_bytes(path, MAX_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a config or a script") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; is this a config or a script?") from None
    except OSError as error:
        said = f"larger than {MAX_BYTES} bytes" if error.errno == errno.EFBIG else f"cannot be read ({error.strerror})"
        raise ConfigError(f"{path}: {said}; give the path of a config or a script") from None


def of_shell(text: str, where: str) -> Theirs:
    """The options of the command with most of them; variables that the script itself gives a value are put in."""
    text = text.replace("\r\n", "\n")
    joined = re.sub(r"\\[ \t]*\n", "\v", text)  # a line that goes on, with a mark for those who count
    values: dict[str, str] = {}
    best: list[str] = []
    begins = behind = 1
    command = ""
    for row in joined.split("\n"):
        number, behind = behind, behind + row.count("\v") + 1
        line = row.replace("\v", " ")
        if found := ASSIGNED.match(line):
            values[found[1]] = found[2].strip("\"'")
        elif line.count(" --") > sum(word.startswith("--") for word in best) and not line.lstrip().startswith("#"):
            try:
                best = [_expanded(word, values) for word in shlex.split(line, comments=True)]
            except ValueError:
                raise ConfigError(f"{where}: a quote is not closed in the command; mend it, or give a YAML file") from None
            begins, command = number, row
    written = dict(_options(best))
    options = {key if key in LAUNCHERS else key.replace("-", "_"): value for key, value in written.items()}
    if not options:
        raise ConfigError(f"{where}: holds no command with --key value; give a YAML file, or a script with one")
    launcher = {key: options.pop(key) for key in [*options] if key in LAUNCHERS}
    counts = [n for key, n in launcher.items() if key.startswith(("num_p", "nproc", "num_g")) and isinstance(n, int)]
    words = " ".join(best)
    method = METHOD.search(words.split(" --")[0].lower()) or BEHIND_LAUNCHER.search(words.lower())
    unread = {key: value for key, value in options.items() if isinstance(value, str) and "$" in value}
    keys = {key: value for key, value in options.items() if key not in unread}
    for key in {*unread} & SECRETS:  # that one is given is what counts
        keys[key] = bool(unread.pop(key))
    other = method[1] if method else ""
    if other in ("sft", "rm", "ppo", "grpo"):
        raise ConfigError(f"{where}: is a command of another kind of run ({other}), and no preference run")
    names = {key.replace("-", "_"): key for key in written if "-" in key}
    lines = _places([*written], list(enumerate(command.split("\v"), start=begins)))
    return Theirs(keys, method[1] if method else None, counts[0] if counts else None, unread, lines=lines, names=names)


def _places(options: list[str], rows: list[tuple[int, str]]) -> dict[str, int]:
    """The line in which each option stands first."""
    found = {key: re.compile(rf"(?:--|(?<![\w.-])){re.escape(key)}(?![\w.-])") for key in options}
    return {key: line for key, pattern in found.items() for line, row in reversed(rows) if pattern.search(row)}


def _expanded(word: str, values: dict[str, str]) -> str:
    word = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda m: values.get(m[1], m[2]), word)
    return re.sub(r"\$\{?(\w+)\}?", lambda m: values.get(m[1], m[0]), word)


def _options(words: list[str]) -> Iterator[tuple[str, Any]]:
    """`--key value`, `--key=value`, `--flag`, `--list a b`, `key=value`."""
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if not re.match(r"--[A-Za-z]", word):
            if found := re.fullmatch(r"([A-Za-z_][\w.]*)=(.*)", word):
                yield found[1], _value(found[2])
            continue
        key, equals, value = word[2:].partition("=")
        behind: list[str] = []
        while not equals and at < len(words) and not re.match(r"--[A-Za-z]", words[at]):
            behind.append(words[at])
            at += 1
        if equals:
            yield key, _value(value)
        elif key in LAUNCHERS or len(behind) == 1:
            yield key, _value(behind[0]) if behind else True
        else:
            values = [_value(each) for each in behind if not each.endswith(".py")]
            yield key, values if values else True


def _value(text: str) -> Any:
    try:
        return parse_value(text) if text else ""
    except YamlError:
        return text
