"""Configs of other trainers in Python scripts: the calls of `DPOConfig(...)` and the like, with what their arguments are as
far as `literals` knows it. Nothing is run.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from dspref.convert.literals import Unknown, Values
from dspref.convert.theirs import OF_BEMA, OF_LORA, OF_PEFT, PARSERS, Theirs
from dspref.errors import ConfigError

METHODS = {
    "DPO": "dpo",
    "CPO": "cpo",
    "ORPO": "orpo",
    "SimPO": "simpo",
    "KTO": "kto",
    "BCO": "bco",
    "TPO": "tpo",
}
CONFIGS = {f"{name}Config": method for name, method in METHODS.items()}
TRAINERS = {f"{name}Trainer": method for name, method in METHODS.items()}
OTHER_CONFIGS = {
    "SFTConfig": "sft",
    "GRPOConfig": "grpo",
    "RLOOConfig": "rloo",
    "PPOConfig": "ppo",
    "RewardConfig": "reward",
}
OF_TRAINER = {
    "beta", "loss_type", "max_length", "max_prompt_length", "label_smoothing", "precompute_ref_log_probs",
    "desirable_weight", "undesirable_weight",
}  # fmt: skip
OF_BITS = {"load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type"}
# Methods of a data set that make other rows of it by a function.
OF_ROWS = {"map", "filter"}
OF_MODEL = {"torch_dtype", "dtype", "attn_implementation", "revision", "load_in_4bit"}


def of_python(text: str, where: str) -> Theirs:
    """The keywords of the configs, adapters, data sets and models that a script makes. Raises ConfigError."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise ConfigError(f"{where}{line}: is no Python that can be read; mend it, or give a YAML file") from None
    script = _Script(tree)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        words = [word.arg for word in call.keywords if word.arg]
        if twice := next((word for number, word in enumerate(words) if word in words[:number]), None):
            raise ConfigError(f"{where}:{call.lineno}: {twice}: is given twice in one call; take one out")
        script.read(call)
    script.read_later_changes(tree)
    if script.found.method is None:
        kind = f"a {script.foreign}" if script.foreign else f"no {', '.join([*CONFIGS][:-1])} or {[*CONFIGS][-1]}"
        raise ConfigError(f"{where}: holds {kind}; dspref reads the configs of preference runs")
    return script.found


class _Script:
    """What was found of a script so far."""

    def __init__(self, tree: ast.Module) -> None:
        self.values = Values(tree)
        self.found = Theirs({})
        self.foreign: str | None = None

    def read(self, call: ast.Call) -> None:
        found, name = self.found, ast.unparse(call.func).split(".")
        if name[-1] in CONFIGS or name[-1] == "TrainingArguments":
            found.method = CONFIGS.get(name[-1], found.method)
            self.keywords(call)
        elif name[-1] in OTHER_CONFIGS:
            self.foreign = self.foreign or name[-1]
        elif name[-1] in TRAINERS:
            found.method = found.method or TRAINERS[name[-1]]
            self.keywords(call, only=OF_TRAINER)
            given = next((word.value for word in call.keywords if word.arg == "model"), call.args[0] if call.args else None)
            if given is not None and isinstance(self.literal(given), str) and "model_name_or_path" not in found.keys:
                self.set("model_name_or_path", given, "model")
        elif name[-1] == "LoraConfig":
            found.keys["use_peft"] = True
            self.keywords(call, renamed=OF_LORA)
            found.defaults |= OF_PEFT
        elif name[-1] == "BEMACallback":
            found.keys.setdefault("bema.update_ref_model", False)
            found.names.setdefault("bema.update_ref_model", "BEMACallback(update_ref_model)")
            found.lines.setdefault("BEMACallback(update_ref_model)", call.lineno)
            self.keywords(call, only={*OF_BEMA}, renamed=OF_BEMA)
        elif name[-1] in PARSERS:
            found.unread[name[-1]], found.lines[name[-1]] = ast.unparse(call), call.lineno
        elif name[-1] == "BitsAndBytesConfig":
            self.keywords(call, only=OF_BITS)
        elif name[-1] in ("ModelConfig", "ScriptArguments"):
            self.keywords(call)
        elif name[-1] == "load_dataset":
            self.dataset(call)
        elif name[-1] in OF_ROWS and isinstance(call.func, ast.Attribute) and call.args:
            found.unread.setdefault(name[-1], ast.unparse(call))
            found.lines.setdefault(name[-1], call.lineno)
        elif name[-1] == "from_pretrained" and "Model" in name[0] and call.args:
            self.model(call)

    def literal(self, node: ast.expr) -> Any:
        """A value; None where it is computed."""
        try:
            return self.values.of(node)
        except Unknown:
            return None

    def set(self, key: str, node: ast.expr, name: str = "") -> None:
        """A key, or the code of one that is computed. `name`: what the script calls it."""
        found = self.found
        for table in (found.keys, found.unread, found.remarks):
            table.pop(key, None)
        found.lines[key] = node.lineno
        if name and name != key:
            found.names[key] = name
        try:
            found.keys[key] = self.values.of(node)
        except Unknown:
            found.unread[key] = ast.unparse(node)
            return
        if self.values.of_environment:
            found.remarks[key] = f"{self.values.of_environment}, of which the default is taken"

    def keywords(self, call: ast.Call, only: set[str] | None = None, renamed: Mapping[str, str] | None = None) -> None:
        for word in call.keywords:
            if word.arg is None:
                inner = self.literal(word.value)
                if isinstance(inner, dict):
                    kept = {str(key): value for key, value in inner.items() if not only or key in only}
                    kept = {(renamed or {}).get(key, key): value for key, value in kept.items()}
                    self.found.keys.update(kept)
                    self.found.lines.update(dict.fromkeys(kept, word.value.lineno))
                elif only is None:
                    self.found.unread[f"**{ast.unparse(word.value)}"] = ast.unparse(word.value)
            elif only is None or word.arg in only:
                self.set((renamed or {}).get(word.arg, word.arg), word.value, word.arg)

    def dataset(self, call: ast.Call) -> None:
        found, words = self.found, {word.arg: word.value for word in call.keywords if word.arg}
        where = call.args[0] if call.args else words.get("path")
        split, files = self._word(words, "split"), self._word(words, "data_files")
        if where is not None and self.literal(where) in ("json", "csv", "parquet") and isinstance(files, str | list):
            where = words["data_files"]
        path = self.literal(where) if where is not None else None
        held_out = isinstance(split, str) and re.match(r"(test|val|eval|dev)", split)
        if where is None or path == found.keys.get("dataset_name", ""):
            return
        known = isinstance(path, str) and path not in ("json", "csv", "parquet")
        if "dataset_name" in {**found.keys, **found.unread} and not held_out:
            if known:
                found.unread["load_dataset"] = ast.unparse(call)
            return
        if "dataset_name" in {**found.keys, **found.unread}:
            self.set("eval_dataset", where, "load_dataset")
        elif known:
            self.set("dataset_name", where, "load_dataset")
        else:
            found.unread["dataset_name"], found.lines["dataset_name"] = ast.unparse(where), call.lineno
            found.names["dataset_name"] = "load_dataset"
        name = call.args[1] if len(call.args) > 1 else words.get("name")
        if name is not None:
            self.set("dataset_config", name, "name")
        if "split" in words:
            self.set("dataset_test_split" if held_out else "dataset_train_split", words["split"], "split")

    def _word(self, words: Mapping[str, ast.expr], key: str) -> Any:
        return self.literal(words[key]) if key in words else None

    def model(self, call: ast.Call) -> None:
        found, path = self.found, self.literal(call.args[0])
        if "model_name_or_path" in found.keys:
            if isinstance(path, str) and path != found.keys["model_name_or_path"]:
                self.set("ref_model", call.args[0], "from_pretrained")
            return
        self.set("model_name_or_path", call.args[0], "from_pretrained")
        if isinstance(path, str):
            self.keywords(call, only=OF_MODEL, renamed={"revision": "model_revision"})

    def read_later_changes(self, tree: ast.Module) -> None:
        """`args.beta = 0.2` and `setattr(args, "beta", 0.2)` behind `args = DPOConfig(...)`."""
        configs = {
            name
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
            if ast.unparse(node.value.func).split(".")[-1] in (*CONFIGS, "TrainingArguments")
            for name in map(ast.unparse, node.targets)
        }
        for node in ast.walk(tree):
            match node:
                case ast.Assign(targets=[ast.Attribute(value=ast.Name(id=name), attr=key)], value=value) if name in configs:
                    self.set(key, value)
                case ast.Call(func=ast.Name("setattr"), args=[ast.Name(id=name), ast.Constant(value=str(key)), value]) if (
                    name in configs
                ):
                    self.set(key, value)
                case ast.AugAssign(target=ast.Attribute(value=ast.Name(id=name), attr=key)) if name in configs:
                    self.found.keys.pop(key, None)
                    self.found.unread[key] = ast.unparse(node)
