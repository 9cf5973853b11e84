"""What a config names on this machine, looked at without loading any of it: data, models, tokenizers, templates, folders.

What is on the hub is not looked at; it is named, so that nobody takes it for checked.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from dspref import reading
from dspref.config import DataSection, ModelSection, ReferenceSection, SourceSection, shipped
from dspref.config.explain import Complaint, line
from dspref.config.hints import near
from dspref.config.sound import KeyPath
from dspref.config.yaml12 import Position
from dspref.data.sources import HUB_NAME, SUFFIXES
from dspref.errors import ConfigError
from dspref.machine.places import nearest
from dspref.run import record
from dspref.run.finding import is_foreign

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LFS_POINTER = b"version https://git-lfs"
# A configuration of a page, and the header of a file of weights.
MAX_JSON, MAX_HEADER = 10_000_000, 100_000_000


# What `dspref convert` writes where theirs does not say.
TO_FILL_IN = "FILL_IN/"


class Found(NamedTuple):
    """What was seen of the things that a config names."""

    faults: list[tuple[KeyPath, str]]
    """(path of the key, reason with its remedy)"""
    on_hub: list[str]
    """`key value`, of what was not looked at."""


def look(
    model: ModelSection,
    reference: ReferenceSection,
    data: DataSection,
    beside: Path | None = None,
    prompts: str | None = None,
) -> Found:
    """At what a run reads. `beside`: the folder of the config, where people expect what they name relative to it; `prompts`:
    the file of log.samples_file."""
    found = Found([], [])
    own: list[tuple[KeyPath, str, Judge]] = [(("log", "samples_file"), prompts, _prompts)] if prompts else []
    for path, name, judge in [*_named(model, reference, data), *own]:
        if name.startswith(TO_FILL_IN):
            found.faults.append((path, f"{name}: is still to be filled in"))
            continue
        place = Path(name) if path == ("model", "chat_template") else shipped(name)
        try:
            if judge not in (_template, _prompts) and not place.exists() and _is_hub_id(name):
                if not (beside and (beside / name).exists()):
                    found.on_hub.append(f"{'.'.join(map(str, path))} {name}")
                    continue
                reasons = ["no such file or folder"]
            else:
                reasons = list(judge(place))
        except OSError as error:
            reasons = [f"cannot be read ({error.strerror or error}); mend its permissions"]
        if reasons:
            found.faults.append((path, f"{name}: {reasons[0]}{_beside(reasons[0], name, beside)}"))
    return once_each(found)


def once_each(found: Found) -> Found:
    """With the first fault of each key."""
    first = dict(reversed(found.faults))  # a folder that is no model holds no tokenizer either
    return Found(list(first.items())[::-1], list(dict.fromkeys(found.on_hub)))


def refuse(found: Found, positions: Mapping[KeyPath, Position]) -> list[str]:
    """Raise ConfigError, with a line for each, where something that a config names is not there or no good; what was not
    looked at. `positions`: of the config's keys."""
    if found.faults:
        raise ConfigError("\n".join(line(Complaint(*fault), positions) for fault in found.faults))
    return found.on_hub


Judge = Callable[[Path], Iterator[str]]


def _named(model: ModelSection, reference: ReferenceSection, data: DataSection) -> Iterator[tuple[KeyPath, str, Judge]]:
    """(key, value, what looks at it) of everything that a run reads."""
    tokenizer = ("model", "tokenizer_name_or_path") if model.tokenizer_name_or_path else ("model", "name_or_path")
    yield ("model", "name_or_path"), model.name_or_path, _model if model.init == "pretrained" else _model_config
    yield tokenizer, model.tokenizer_name_or_path or model.name_or_path, _tokenizer
    if model.chat_template is not None:
        yield ("model", "chat_template"), model.chat_template, _template
    if model.lora and model.lora.path:
        yield ("model", "lora", "path"), model.lora.path, lambda folder: _adapter(folder, model.adapter_name)
    if reference.name_or_path:
        name = reference.adapter_name or "default"
        yield ("reference", "name_or_path"), reference.name_or_path, lambda folder: _reference(folder, name)
    for number, source in enumerate(data.train_sources):
        yield from _source(("data", "train", number) if isinstance(data.train, list) else ("data", "train"), source)
    for prefix, source in data.eval_sources.items():
        own = ("data", "eval") if isinstance(data.eval, SourceSection) else ("data", "eval", prefix[5:-1])
        yield from _source(own, source)


def _source(path: KeyPath, source: SourceSection) -> Iterator[tuple[KeyPath, str, Judge]]:
    yield (*path, "path"), source.path, _data


def _is_hub_id(name: str) -> bool:
    """Whether nothing speaks for a path: as in data.sources, a folder that is there makes `folder/name` a path."""
    local = "/" in name and Path(name).parent.is_dir()
    return bool(HUB_NAME.fullmatch(name)) and not local and not name.endswith((*SUFFIXES, ".jinja"))


def _beside(reason: str, name: str, folder: Path | None) -> str:
    """Paths are relative to the working directory, and not to the file that names them."""
    if "no such" not in reason or folder is None or not (folder / name).exists() or Path(name).is_absolute():
        return ""
    return f"; did you mean {folder / name}? paths are relative to the working directory"


def _absent(path: Path, what: str) -> str:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = near(path.name, siblings)
    return f"no such {what}; " + (f"did you mean {path.parent / close}?" if close else "check the path")


# ---------------------------------------------------------------------------------------------------------------------
# One function for each kind of thing: the reasons why it is not good


def _data(path: Path) -> Iterator[str]:
    if path.is_dir():
        if not any(entry.name.lower().endswith((*SUFFIXES, ".arrow")) and entry.is_file() for entry in path.rglob("*")):
            yield "the folder holds no data file; put a .jsonl, .csv or .parquet file there"
    elif path.exists():
        yield from _data_file(path)
    elif glob.has_magic(str(path)):
        files = [Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file()]
        if not files:
            yield "no such file matches the pattern; check the path"
        for file in files:
            yield from (f"{file}: {reason}" for reason in _data_file(file))
    else:
        yield _absent(path, "file or folder")


def _data_file(path: Path) -> Iterator[str]:
    if not path.name.lower().endswith(SUFFIXES):
        yield f"unknown kind of file; name it one of {', '.join(SUFFIXES)}"
        return
    try:
        with reading.open_regular(path) as file:
            head = file.read(len(LFS_POINTER))
    except OSError as error:
        yield f"{error.strerror}; name a file"
        return
    if not head:
        yield "the file is empty; write at least one row"
    elif head == LFS_POINTER:
        yield "is a pointer of Git LFS, and not the data; git lfs pull"


def _prompts(path: Path) -> Iterator[str]:
    if not path.exists():
        yield _absent(path, "file")
        return
    try:
        with reading.open_regular(path) as file:
            if not file.read(1):
                yield "the file is empty; write at least one prompt"
    except OSError as error:
        yield f"{error.strerror}; name a file"


def _folder(path: Path, key: str) -> Iterator[str]:
    if path.is_file():
        yield f"is a file; give the folder that holds it, {path.parent}"
    elif not path.exists():
        yield _absent(path, "folder, and no hub id")
    elif not (path / key).is_file():
        inner = next((entry for entry in (path / "final", *sorted(path.glob("*"))) if (entry / key).is_file()), None)
        yield f"holds no {key}; " + (f"did you mean {inner}?" if inner else "give the folder that save_pretrained wrote")


def _model_config(folder: Path) -> Iterator[str]:
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        yield "is a LoRA adapter; name its model here, and it in model.lora.path"
        return
    yield from _folder(folder, "config.json")
    for name in ("config.json", "generation_config.json"):
        yield from _json(folder / name)


def _json(path: Path) -> Iterator[str]:
    if not os.path.lexists(path):
        return
    try:
        content = reading.read_json(path, MAX_JSON, strict=False)
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        yield f"{path.name} is not a JSON object; restore it, or download the model again"


def _model(folder: Path) -> Iterator[str]:
    yield from _model_config(folder)
    weights = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if folder.is_dir() and not weights:
        remedy = "save the model again with save_pretrained, or set model.init: random"
        yield f"holds no *.safetensors (pickled weights are not read); {remedy}"
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        yield from _json(index)
        named = set(re.findall(r'"([^"/\\]+\.safetensors)"', index.read_text(encoding="utf-8", errors="replace")))
        if absent := sorted(named - {path.name for path in weights}):
            yield f"{absent[0]} is missing, which {index.name} names; download the model again"
    for path in weights:
        yield from _weights(path)


def _weights(path: Path) -> Iterator[str]:
    """The header of a safetensors file says how long it is."""
    size = path.stat().st_size
    try:
        opened = reading.open_regular(path)
    except OSError as error:
        yield f"{path.name} {error.strerror}; download the model again"
        return
    with opened as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        text = file.read(length) if length < min(size, MAX_HEADER) else b""
    if (head + text)[:8] == LFS_POINTER[:8]:
        yield f"{path.name} is a pointer of Git LFS, and not the weights; git lfs pull"
        return
    try:
        entries = [entry for name, entry in json.loads(text).items() if name != "__metadata__"]
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        end = -1
    if end != size:
        yield f"{path.name} is not a whole safetensors file; download the model again"


def _tokenizer(folder: Path) -> Iterator[str]:
    if not folder.is_dir():
        yield from _folder(folder, "")
    elif not any((folder / name).is_file() for name in TOKENIZER_FILES):
        yield "holds no tokenizer; set model.tokenizer_name_or_path to a folder that does, or to a hub id"


def _template(path: Path) -> Iterator[str]:
    text = str(path)
    if "{{" not in text and "{%" not in text:
        if not path.exists():
            yield _absent(path, "file")
            return
        try:
            text = reading.read_text(path)
        except (OSError, UnicodeDecodeError) as error:
            yield f"{reading.words(error)}; give a Jinja file"
            return
    yield from syntax_fault(text)


def syntax_fault(text: str) -> Iterator[str]:
    """Why a chat template does not compile, with what transformers allows in one."""
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks what the model writes."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    jinja = ImmutableSandboxedEnvironment(extensions=[Generation, "jinja2.ext.loopcontrols"])
    try:
        jinja.compile(text)
    except TemplateSyntaxError as error:
        yield f"line {error.lineno}: not valid Jinja: {error.message}; mend the template"
    except SyntaxError as error:  # of the Python that Jinja makes of it
        yield f"not valid Jinja: {error.msg}; mend the template"
    except RecursionError:
        yield "not valid Jinja: nested too deeply; mend the template"


def _adapter(folder: Path, name: str) -> Iterator[str]:
    own = folder / name if (folder / name / ADAPTER_CONFIG).is_file() else folder
    yield from _folder(own, ADAPTER_CONFIG)
    if (own / ADAPTER_CONFIG).is_file() and not (own / ADAPTER_WEIGHTS).is_file():
        yield f"holds no {ADAPTER_WEIGHTS}; save the adapter again with save_pretrained"
    yield from _json(own / ADAPTER_CONFIG)
    if (own / ADAPTER_WEIGHTS).is_file():
        yield from _weights(own / ADAPTER_WEIGHTS)


def _reference(folder: Path, name: str) -> Iterator[str]:
    is_adapter = any((place / ADAPTER_CONFIG).is_file() for place in (folder, folder / name))
    yield from _adapter(folder, name) if is_adapter else _model(folder)


# ---------------------------------------------------------------------------------------------------------------------
# What a run writes


def folders(output_dir: Path, store: str | None, anew: bool) -> Iterator[tuple[KeyPath, str]]:
    """(key, reason) of the folders that cannot be written to, or are not for this run, which begins `anew` or not."""
    own: dict[KeyPath, str | None] = {("output_dir",): str(output_dir), ("reference", "store"): store}
    for path, name in own.items():
        if name and (reason := unwritable(Path(name))):
            yield path, f"{name}: {reason}; choose another folder"
    if is_foreign(output_dir):
        yield ("output_dir",), f"{output_dir}: is not empty and holds no dspref run; choose another folder"
    elif said := record.misplaced(output_dir, anew):
        yield ("output_dir",), said


def unwritable(folder: Path) -> str | None:
    """Why nothing can be written to a folder, or to where it would be made; a file is made and taken away again, as
    permissions alone say nothing of read-only mounts, and nothing to root."""
    whole = folder.absolute()
    if links := [part for part in (whole, *whole.parents) if os.path.islink(part) and not os.path.exists(part)]:
        return f"{'is' if links[0] == whole else f'{os.path.relpath(links[0])} is'} a link that leads nowhere"
    there = nearest(folder)
    if not there.is_dir():
        return "is a file" if there == folder.absolute() else f"{os.path.relpath(there)} is a file"
    try:
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError as error:
        return f"cannot be written ({error.strerror})"
