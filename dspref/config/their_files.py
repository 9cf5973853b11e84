"""Configs of other trainers as flat keys and values: YAML or JSON files, Python scripts, shell scripts. Nothing is run.

Of a script the calls of `DPOConfig(...)` and the like are read, with what their arguments are as literals; of a shell script
the longest command with `--key value`.
"""

from __future__ import annotations

import ast
import errno
import re
import shlex
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dspref import reading
from dspref.config.numbers import Shorthand, meant
from dspref.config.yaml12 import MAX_BYTES, YamlError, parse, parse_value
from dspref.errors import ConfigError

CONFIGS = {"DPOConfig": "dpo", "CPOConfig": "cpo", "ORPOConfig": "orpo", "SimPOConfig": "simpo", "KTOConfig": "kto"}
TRAINERS = {"DPOTrainer": "dpo", "CPOTrainer": "cpo", "ORPOTrainer": "orpo", "SimPOTrainer": "simpo", "KTOTrainer": "kto"}
OTHER_CONFIGS = {
    "SFTConfig": "sft",
    "GRPOConfig": "grpo",
    "RLOOConfig": "rloo",
    "PPOConfig": "ppo",
    "RewardConfig": "reward",
}
OF_LORA = {
    "r": "lora_r", "target_modules": "lora_target_modules", "modules_to_save": "lora_modules_to_save",
    "task_type": "lora_task_type",
}  # fmt: skip
# What peft takes where a script says nothing; TRL's command line has its own.
OF_PEFT = {"lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0}
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
SECRETS = {"use_wandb", "logger.wandb.key"}
ASSIGNED = re.compile(r"\s*(?:export\s+)?([A-Za-z_]\w*)=(\"[^\"$`]*\"|'[^']*'|[^\s\"'$`;&|]+)\s*$")


@dataclass
class Theirs:
    """What a file says."""

    keys: dict[str, Any]
    method: str | None = None
    """dpo, cpo, ...: what a class or a command tells."""
    gpus: int | None = None
    unread: dict[str, str] = field(default_factory=dict)
    """Keys whose values are computed, and the code."""


def read(path: Path, python: bool = False) -> Theirs:
    """A file by its kind. Raises ConfigError."""
    if (python and path.suffix not in (".sh", ".bash")) or path.suffix == ".py":
        try:
            with warnings.catch_warnings(action="ignore"):  # of the script's own escapes
                return of_python(_text(path), str(path))
        except RecursionError:
            raise ConfigError(f"{path}: nested too deeply to be read; give a YAML file") from None
    if path.suffix in (".sh", ".bash", ".sbatch", ".slurm"):
        return of_shell(_text(path), str(path))
    return Theirs({key: _as_there(value) for key, value in parse(path)[0].items()})


def _as_there(value: Any) -> Any:
    """A value as the YAML 1.1 of their loaders has it: `yes` is true, and `1_000` a number."""
    if isinstance(value, Shorthand) and "_" in value:
        number = meant(value, "")
        return value if number is None else number
    word = value.lower() if isinstance(value, str) else ""
    return word in ("yes", "on") if word in ("yes", "no", "on", "off") else value


def _text(path: Path) -> str:
    try:
        return reading.read_bytes(path, MAX_BYTES).decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a config or a script") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; is this a config or a script?") from None
    except OSError as error:
        said = f"larger than {MAX_BYTES} bytes" if error.errno == errno.EFBIG else f"cannot be read ({error.strerror})"
        raise ConfigError(f"{path}: {said}; give the path of a config or a script") from None


# ---------------------------------------------------------------------------------------------------------------------
# Python


def of_python(text: str, where: str) -> Theirs:
    """The keywords of the configs, adapters, data sets and models that a script makes."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise ConfigError(f"{where}{line}: is no Python that can be read; mend it, or give a YAML file") from None
    known = _constants(tree)
    found = Theirs({})
    foreign = None
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func).split(".")
        if name[-1] in CONFIGS or name[-1] == "TrainingArguments":
            found.method = CONFIGS.get(name[-1], found.method)
            _keywords(call, known, found)
        elif name[-1] in OTHER_CONFIGS:
            foreign = foreign or name[-1]
        elif name[-1] in TRAINERS:
            found.method = found.method or TRAINERS[name[-1]]
            wanted = {"beta", "loss_type", "max_length", "max_prompt_length", "label_smoothing", "precompute_ref_log_probs"}
            _keywords(call, known, found, only=wanted)
            given = next((word.value for word in call.keywords if word.arg == "model"), call.args[0] if call.args else None)
            if given is not None and isinstance(name_or_path := _literal(given, known), str):
                found.keys.setdefault("model_name_or_path", name_or_path)
        elif name[-1] == "LoraConfig":
            found.keys["use_peft"] = True
            _keywords(call, known, found, renamed=OF_LORA)
            for key, value in OF_PEFT.items():
                found.keys.setdefault(key, value)
        elif name[-1] in ("ModelConfig", "ScriptArguments"):
            _keywords(call, known, found)
        elif name[-1] == "load_dataset":
            _dataset(call, known, found)
        elif name[-1] == "from_pretrained" and "Model" in name[0] and call.args:
            _model(call, known, found)
    if found.method is None:
        kind = f"a {foreign}" if foreign else "no DPOConfig, CPOConfig, ORPOConfig or SimPOConfig"
        raise ConfigError(f"{where}: holds {kind}; dspref reads the configs of preference runs")
    return found


def _constants(tree: ast.Module) -> dict[str, Any]:
    """Names that a script gives one literal."""
    known: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            value = _literal(node.value, known)
            name = node.targets[0].id
            known[name] = value if name not in known else _Unknown
    return {name: value for name, value in known.items() if value is not _Unknown}


class _Unknown:
    """The value of what is computed."""


def _literal(node: ast.expr, known: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch."):
        return node.attr
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "dict" and not node.args:
        values = {word.arg: _literal(word.value, known) for word in node.keywords if word.arg}
        return _Unknown if _Unknown in values.values() else values
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return _Unknown
    return list(value) if isinstance(value, tuple | set) else value


def _keywords(
    call: ast.Call, known: dict[str, Any], found: Theirs, only: set[str] | None = None, renamed: dict[str, str] | None = None
) -> None:
    for word in call.keywords:
        if word.arg is None:
            inner = _literal(word.value, known)
            if isinstance(inner, dict):
                found.keys.update({str(key): value for key, value in inner.items()})
            elif only is None:
                found.unread[f"**{ast.unparse(word.value)}"] = ast.unparse(word.value)
        elif only is None or word.arg in only:
            key, value = (renamed or {}).get(word.arg, word.arg), _literal(word.value, known)
            if value is _Unknown:
                found.unread[key] = ast.unparse(word.value)
            else:
                found.keys[key] = value


def _dataset(call: ast.Call, known: dict[str, Any], found: Theirs) -> None:
    words = {word.arg: _literal(word.value, known) for word in call.keywords if word.arg}
    path = _literal(call.args[0], known) if call.args else words.get("path", _Unknown)
    if path in ("json", "csv", "parquet") and isinstance(words.get("data_files"), str | list):
        path = words["data_files"]
    if not isinstance(path, str) or path in (found.keys.get("dataset_name"), None):
        return
    name = _literal(call.args[1], known) if len(call.args) > 1 else words.get("name")
    split = words.get("split")
    held_out = isinstance(split, str) and re.match(r"(test|val|eval|dev)", split)
    if "dataset_name" in found.keys and not held_out:
        found.unread["load_dataset"] = ast.unparse(call)
        return
    if held_out and "dataset_name" in found.keys:
        found.keys["eval_dataset"] = path
    found.keys.setdefault("dataset_name", path)
    if isinstance(name, str):
        found.keys["dataset_config"] = name
    if isinstance(split, str):
        found.keys["dataset_test_split" if held_out else "dataset_train_split"] = split


def _model(call: ast.Call, known: dict[str, Any], found: Theirs) -> None:
    path = _literal(call.args[0], known)
    if not isinstance(path, str):
        found.unread["model_name_or_path"] = ast.unparse(call.args[0])
        return
    if "model_name_or_path" in found.keys:
        if path != found.keys["model_name_or_path"]:
            found.keys["ref_model"] = path
        return
    found.keys["model_name_or_path"] = path
    _keywords(call, known, found, only={"torch_dtype", "dtype", "attn_implementation", "revision", "load_in_4bit"},
              renamed={"revision": "model_revision"})  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Shell


def of_shell(text: str, where: str) -> Theirs:
    """The options of the command with most of them; variables that the script itself gives a value are put in."""
    joined = re.sub(r"\\[ \t]*\n", " ", text)
    values: dict[str, str] = {}
    best: list[str] = []
    for line in joined.splitlines():
        if found := ASSIGNED.match(line):
            values[found[1]] = found[2].strip("\"'")
        elif line.count(" --") > sum(word.startswith("--") for word in best) and not line.lstrip().startswith("#"):
            try:
                best = [_expanded(word, values) for word in shlex.split(line, comments=True)]
            except ValueError:
                raise ConfigError(f"{where}: a quote is not closed in the command; mend it, or give a YAML file") from None
    options = dict(_options(best))
    if not options:
        raise ConfigError(f"{where}: holds no command with --key value; give a YAML file, or a script with one")
    launcher = {key: options.pop(key) for key in [*options] if key in LAUNCHERS}
    counts = [n for key, n in launcher.items() if key.startswith(("num_p", "nproc", "num_g")) and isinstance(n, int)]
    words = " ".join(best)
    method = re.search(r"(?<![a-z])(orpo|simpo|cpo|dpo|kto|sft|grpo|ppo|rm)(?![a-z])", words.split(" --")[0].lower())
    unread = {key: value for key, value in options.items() if isinstance(value, str) and "$" in value}
    keys = {key: value for key, value in options.items() if key not in unread}
    for key in {*unread} & SECRETS:  # that one is given is what counts
        keys[key] = bool(unread.pop(key))
    other = "sft" if "openrlhf" in words and "train_sft" in words else method[1] if method else ""
    if other in ("sft", "rm", "ppo", "grpo", "kto"):
        raise ConfigError(f"{where}: is a command of another kind of run ({other}), and no preference run")
    return Theirs(keys, method[1] if method else None, counts[0] if counts else None, unread)


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
