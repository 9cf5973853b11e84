"""Writes keys.md and from-other-trainers.md beside this file, from the schema and the tables; a test holds them current.

python docs/make_keys.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dspref.config.absent import _NOT_NEEDED
from dspref.config.foreign import _FOREIGN_KEYS
from dspref.config.foreign_values import VALUES
from dspref.config.sections import Config
from dspref.convert.dialects import DIALECTS

KEYS = """\
# Every key

<!-- Written by docs/make_keys.py from dspref/config/. Edit that, and run it again. -->

All keys of a run's YAML, section by section, with what they take and their default; the objectives are in
[objectives.md](objectives.md). `dspref check --show run.yaml` prints each with its value in your run.

Your editor completes and explains them: `dspref schema > ~/dspref.json`, and at the top of the file, for the YAML language
server (VS Code's YAML extension, Neovim, Emacs, JetBrains):

    # yaml-language-server: $schema=/home/me/dspref.json

**Numbers** may be written `1e-6`, `1_000`, `2^20`, `16k`, `1.5M`: `k` is 1024 in keys that count tokens (`max_length` and
the other lengths, `tokens_per_pack`), and 1000 elsewhere; in quotes they are text. Variables are never expanded.

**`include: base.yaml`** at the top of a file, or a list of files, takes in their keys; those of the including file are
on top, mappings merged key by key. A path is relative to the file that names it.

"""

FROM_OTHERS = """\
# I come from TRL, axolotl, LLaMA-Factory, ...

<!-- Written by docs/make_keys.py from dspref/config/. Edit that, and run it again. -->

    dspref convert their.yaml --gpus 8 -o run.yaml     # whose it is, is told by its keys; or --from axolotl
    dspref convert train_dpo.py -o from_python.yaml    # DPOConfig(...), LoraConfig(...), load_dataset(...); never run
    dspref convert train_dpo.sh -o from_shell.yaml     # the command with --key value
    dspref check run.yaml

reads configs of {dialects}, and writes a dspref YAML. What
differs there, or has no place here, stands in it as a comment, by the name that it has there and with its line; so do
their defaults, where the file has none. Files may be YAML, JSON or TOML, flat or in groups (`training_args:`). Of a script
literals are read, names that are given one, and simple arithmetic and text of these. What else is computed there, and what
only you know, is `FILL_IN`: the command says how many there are, and `dspref check` refuses each until it is written.
`--gpus` is how many it ran on: their batch is per GPU, dspref's `train.pairs_per_step` the whole step's. TRL's configs do
not name the method, so `--objective orpo` does where keys and names do not. Configs of supervised fine-tuning, reward
models and reinforcement learning are refused.

You may also just write their keys: each is answered with dspref's, by `dspref check`, before anything is loaded.

What is different, whoever you come from:

- **One global batch.** `train.pairs_per_step` pairs make a step on any number of GPUs; `data.tokens_per_pack` bounds the
  memory of one. There is no accumulation to set, and no padding.
- **KTO and BCO** count single answers in `train.pairs_per_step`, and estimate the reference point (`kl`, `bco_delta`) over
  the whole step; TRL, LLaMA-Factory and OpenRLHF do for each micro-batch of a GPU, which must not be of one answer. TRL
  makes two examples of a pair; here a pair is one, with a desirable and an undesirable answer.
- **The reference** is scored once and stored, and shared by runs (`reference.mode`); it need not be in memory.
- **Truncation** takes from the prompt first, down to `data.min_prompt_length`, then from the answers; TRL cuts prompt and
  answer as one text.
- **What is scored** is what the model writes; `data.scored: all` is TRL's rule.
- **Warm-up** is 10 % of the steps unless you say otherwise; TRL has none. LoRA's default is every linear layer.
- **DeepSpeed's settings** hold strategy alone: pick one of `ds_configs/`.
- **A run goes on** from its newest checkpoint by itself.

## Where their keys are here

Keys that have the same name in both (`learning_rate`, `beta`, `lora_alpha`, ...) are not listed; [keys.md](keys.md) has all.

"""
NONE = """
## Keys that have no place here, and why

"""
WORDS = """
## Values by other names

"""


def keys() -> str:
    """Of the schema, a table for each section."""
    schema = Config.model_json_schema()
    parts = [KEYS, *_section(schema, "", schema)]
    for name, about in schema["properties"].items():
        for number, section in enumerate(_sections(about, schema)):
            title = section["properties"].get("name", {}).get("const")
            heading = f"{name}, `name: {title}`" if title else name
            said = f"{about.get('description', '')}\n\n" if number == 0 else ""
            parts += [f"\n## {heading}\n\n{said}", *_section(section, f"{name}.", schema)]
            for key, inner in section["properties"].items():
                for below in _sections(inner, schema) if (name, key) != ("data", "eval") else []:
                    nested = f"{name}.{key}"
                    parts += [f"\n### {nested}\n\n", *_section(below, f"{nested}.", schema)]
                    for last, deep in below["properties"].items():
                        for bottom in _sections(deep, schema):
                            parts += [f"\n#### {nested}.{last}\n\n", *_section(bottom, f"{nested}.{last}.", schema)]
        if name == "data":
            parts.append("\n`data.eval` takes the same sources, or `NAME: {path: ...}` for several.\n")
    return "".join(parts).replace("\n\n\n", "\n\n")


def _sections(about: Mapping[str, Any], schema: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sections that a key may hold."""
    found = []
    for option in [about, *about.get("anyOf", []), *about.get("oneOf", []), about.get("items", {})]:
        if "$ref" in option:
            found.append(schema["$defs"][option["$ref"].rsplit("/", 1)[-1]])
        elif option and option is not about and option.get("type") != "array":
            found += _sections(option, schema)
    unique = [section for number, section in enumerate(found) if section not in found[:number]]
    # What an editor knows of a section with a loss of the user's own repeats the others.
    return [section for section in unique if "properties" in section and not section.get("additionalProperties")]


def _section(section: Mapping[str, Any], prefix: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield "| key | takes | default | meaning |\n| --- | --- | --- | --- |\n"
    needed = section.get("required", [])
    for name, about in section["properties"].items():
        default = "needed" if name in needed else _written(about.get("default"))
        default = "" if isinstance(about.get("default"), dict) else default
        meaning = " ".join(about.get("description", "").split()).replace("|", "\\|")
        yield f"| `{prefix}{name}` | {' or '.join(dict.fromkeys(_kinds(about, schema)))} | {default} | {meaning} |\n"


def _written(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value).replace("'", "")


def _kinds(about: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[str]:
    """What a key takes, in words."""
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{sign} {about[name]:g}" for name, sign in signs.items() if name in about and about[name] < 2**60]
    for option in [*about.get("anyOf", []), *about.get("oneOf", [])]:
        yield from _kinds(option, schema)
    if "$ref" in about:
        yield "keys"
    elif "enum" in about or "const" in about:
        yield ", ".join(f"`{_written(value)}`" for value in about.get("enum", [about.get("const")]))
    elif (kind := about.get("type")) == "array":
        inner = " or ".join(dict.fromkeys(_kinds(about.get("items", {}), schema)))
        yield f"a list ({inner})" if inner else "a list"
    elif kind is not None:
        words = {"integer": "integer", "number": "number", "string": "text", "boolean": "true, false", "null": "null"}
        yield " ".join([words.get(kind, "keys"), ", ".join(bounds)]).strip()


def from_others() -> str:
    """The tables of keys and values, and the words before them."""
    names = ", ".join(DIALECTS[:-1]) + f" and {DIALECTS[-1]}"
    text = FROM_OTHERS.replace("{dialects}", names) + _table(("theirs", "here"), _FOREIGN_KEYS)
    rows = [(f"`{key}`", f"`{theirs}`", f"`{ours}`") for key, table in VALUES.items() for theirs, ours in table.items()]
    text += NONE + _table(("theirs", "why"), _NOT_NEEDED, code=False)
    lines = [("key", "theirs", "here"), ("---", "---", "---"), *rows]
    return text + WORDS + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _table(head: tuple[str, str], groups: Mapping[str, str], code: bool = True) -> str:
    rows = [head, ("---", "---")]
    for ours, theirs in groups.items():
        rows.append((", ".join(f"`{word}`" for word in theirs.split()), ours if not code else _in_code(ours)))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _in_code(place: str) -> str:
    """`train.seed` (a remark)."""
    key, bracket, remark = place.partition(" (")
    return f"`{key}`{bracket}{remark}" if " " not in key or ": " in key else place


if __name__ == "__main__":
    folder = Path(__file__).parent
    (folder / "keys.md").write_text(keys(), encoding="utf-8")
    (folder / "from-other-trainers.md").write_text(from_others(), encoding="utf-8")
