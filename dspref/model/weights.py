"""The files that a model is made of: found, fetched and looked at before anything is loaded. Loads no torch.

What transformers would load is decided here as it decides it, and held to be safetensors of the model's own folder, so that
a digest over `files_of` covers every weight. Nothing here reads a weight: headers tell names, types and shapes.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from dspref import hub, reading
from dspref.config import ModelSection, shipped
from dspref.errors import ConfigError
from dspref.terminal import first_line

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
# What else may be done about weights that are not there, where a run begins with them.
OR_DRAWN = ", or set model.init: random"
# By such names transformers knows a distributed checkpoint, which it would load in place of the other files.
DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
# What config.json may not say: that files of other names are to be read.
ELSEWHERE = ("transformers_weights", "configuration_files")
# More would fill the memory before any weight shows that it is no such model.
MOST_LAYERS = 10_000
# Tensors of quantized layers, by type, or by name where their type is whole numbers.
NARROW = re.compile(r"F[468](_.*)?|[IU](4|8|16|32)")
PACKED = re.compile(r"(^|\.)(q?weight|qzeros|weight_packed|\w+_blocks)$")


class Tensor(NamedTuple):
    """What the header of a file says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    file: Path


# ---------------------------------------------------------------------------------------------------------------------
# Where they lie


def folder_of(section: ModelSection) -> Path:
    """The folder with the model's files, but its weights, downloaded first where `name_or_path` is a hub id. ConfigError."""
    name, code = section.name_or_path, ["*.py"] if section.trust_remote_code else []
    folder = shipped(name)
    if not os.path.isdir(folder):
        if reason := no_folder(name):
            raise ConfigError(f"model.name_or_path: {name}: {reason}")
        return _snapshot(name, section.revision, ("*.json", "*.jinja", *code))
    refuse_other_kinds(folder, f"model.name_or_path: {name}")
    return folder


def fetch(section: ModelSection) -> list[Path]:
    """The files of the model's weights, as `files_of`, downloaded first where `name_or_path` is a hub id."""
    folder = folder_of(section)
    if not os.path.isdir(shipped(section.name_or_path)):
        names = shard_names(folder) if (folder / INDEX).exists() else []
        folder = _snapshot(section.name_or_path, folder.name, (WEIGHTS, *names))  # of the very commit
    return files_of(folder)


def _snapshot(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    try:
        return hub.snapshot(name, revision, patterns)
    except ConfigError as error:
        raise ConfigError(f"model.name_or_path: {error}") from None


def no_folder(name: str) -> str | None:
    """Why a name that can only be a folder's leads nowhere; None for what may be a hub id."""
    path = Path(name).expanduser()
    if os.path.exists(path):
        return "is a file; give the folder it lies in"
    if hub.ID.fullmatch(name):
        above = os.path.dirname(name)
        if not (above and os.path.isdir(above)):  # folder/model of this working directory
            return None
    if name.startswith("~") and os.path.isdir(path):
        return f"'~' is not expanded here; write {path}"
    above = path.parent
    while not os.path.isdir(above):
        path, above = above, above.parent
    try:
        close = difflib.get_close_matches(path.name, [entry.name for entry in os.scandir(above) if entry.is_dir()], n=1)
    except OSError:
        close = []
    return "no such folder; " + (f"did you mean {above / close[0]}?" if close else f"{above} holds no {path.name}")


def refuse_other_kinds(folder: Path, blamed: str) -> None:
    """Raise ConfigError where something in a folder is neither a file of sensible size nor a folder: libraries read what
    lies there by name, and a pipe or device would never end."""
    try:
        for entry in os.scandir(folder):
            if entry.is_dir() or (entry.is_symlink() and not os.path.exists(entry.path)):
                continue
            limit = reading.TABLE if entry.name.endswith((".json", ".jinja", ".txt", ".model")) else 2**63
            reading.refuse_kind(entry.stat(), entry.path, limit)
    except OSError as error:
        reason = f"{error.filename or folder} {reading.words(error)}"
        raise ConfigError(f"{blamed}: {reason}; remove it, or use another model") from None


# ---------------------------------------------------------------------------------------------------------------------
# Which they are


def files_of(folder: Path) -> list[Path]:
    """What transformers loads of a folder, sorted: model.safetensors, or else the shards of its index.

    Raises ConfigError for pickled weights, and for files that lie elsewhere.
    """
    blamed = f"model.name_or_path: {folder}"
    if found := sorted(name for name in os.listdir(folder) if DISTRIBUTED.match(name)):
        raise ConfigError(f"{blamed}: {found[0]} is of a distributed checkpoint; save the model with save_pretrained")
    if (folder / WEIGHTS).is_file() or not os.path.lexists(folder / INDEX):
        paths = [folder / WEIGHTS]
    else:
        paths = [folder / name for name in shard_names(folder)]
    for path in paths:
        if not os.path.isfile(path):
            raise ConfigError(f"{blamed}: {_missing(folder, path)}")
        refuse_outside(path, folder, blamed)
    return paths


def _missing(folder: Path, path: Path) -> str:
    if path.name != WEIGHTS:
        return f"{INDEX} names {path.relative_to(folder)}, which is not there; fetch the model again"
    other = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    if other:
        return f"holds no {WEIGHTS}, nor an index of shards; {other[0]} is not read: rename it, if it is the model"
    return f"holds no {WEIGHTS} (pickled weights are not read); save the model again with save_pretrained{OR_DRAWN}"


def shard_names(folder: Path) -> list[str]:
    """The files that an index names, sorted. Raises ConfigError for an index that is none, and for names that are not of
    safetensors below its folder."""
    path = folder / INDEX
    blamed = f"model.name_or_path: {path}"
    try:
        index = reading.read_json(path, reading.TABLE, strict=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{blamed}: {reading.words(error)}; fetch the model again") from None
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places or not isinstance(index.get("metadata"), dict):
        raise ConfigError(f"{blamed}: is no index (weight_map and metadata); fetch the model again")
    for tensor, name in places.items():
        if not isinstance(name, str) or not name.isprintable():
            raise ConfigError(f"{blamed}: weight_map: {tensor[:80]!r}: is not in a file by its name; fetch the model again")
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts:
            raise ConfigError(f"{blamed}: {name} is outside the model's folder; put the file into it")
        if not name.endswith(".safetensors"):
            raise ConfigError(f"{blamed}: {name} is not safetensors (pickled weights are not read); save the model again")
    return sorted(set(places.values()))


def refuse_outside(path: Path, folder: Path, blamed: str) -> None:
    """Raise ConfigError for a file that a link takes out of its folder, other than to the blobs of the hub's cache."""
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (real.is_relative_to(home) or real.is_relative_to(blobs)):
        raise ConfigError(
            f"{blamed}: {path.relative_to(folder)} is a link to {real}, outside the folder; copy the file there"
        )


# ---------------------------------------------------------------------------------------------------------------------
# What they say


def described(folder: Path, name: str, remote_code: bool = False) -> dict[str, Any]:
    """config.json. Raises ConfigError where it is broken, or describes what is not trained here."""
    blamed = f"model.name_or_path: {name}: {CONFIG}"
    if not os.path.lexists(folder / CONFIG):
        raise ConfigError(f"model.name_or_path: {name}: holds no {CONFIG}; give the folder of a model")
    said = _settings(folder / CONFIG, blamed)
    if os.path.lexists(folder / GENERATION):
        for_generation = f"model.name_or_path: {name}: {GENERATION}"
        for key, value in _settings(folder / GENERATION, for_generation).items():
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int) and abs(number) >= 2**63:
                    raise ConfigError(f"{for_generation}: {key}: {str(number)[:20]} is no token, no length; fetch it again")
    if not isinstance(said.get("model_type"), str) and not (remote_code and "auto_map" in said):
        raise ConfigError(f"{blamed}: names no model_type; is this a model of transformers?")
    for key in ELSEWHERE:
        if said.get(key) is not None:
            remedy = f"name the files {CONFIG} and {WEIGHTS}, and drop the key"
            raise ConfigError(f"{blamed}: {key}: files of other names are not read; {remedy}")
    for key, value in _numbers(said):
        if abs(value) >= 2**63 or ("layer" in key and value > MOST_LAYERS):
            raise ConfigError(f"{blamed}: {key}: {str(value)[:20]} is no size of a model; fetch it again")
    if method := quantized_by(said):
        raise ConfigError(f"model.name_or_path: {name}: {in_full(method)}")
    return said


def _settings(path: Path, blamed: str) -> dict[str, Any]:
    try:
        said = reading.read_json(path, strict=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{blamed}: {reading.words(error)}; fetch it again") from None
    if not isinstance(said, dict):
        raise ConfigError(f"{blamed}: holds no settings; fetch it again")
    return said


def _numbers(said: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Whole numbers, of parts too, by their keys."""
    for key, value in said.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, int):
            yield key, value


def quantized_by(said: Mapping[str, Any]) -> str | None:
    """The method by which a config says that its weights are quantized, whatever part says it."""
    for key, value in said.items():
        if key in ("quantization_config", "compression_config") and value:
            method = value.get("quant_method") if isinstance(value, Mapping) else None
            return method if isinstance(method, str) and method.isprintable() else key
        if isinstance(value, Mapping) and (found := quantized_by(value)):
            return found
    return None


def in_full(method: str) -> str:
    """Why a quantized model is refused, and what to do."""
    return (
        f"its weights are quantized ({method}), and only full precision is trained; name the model that it was made from, "
        "with model.load_in_4bit: true for QLoRA"
    )


def tensors_of(files: list[Path], blamed: str) -> dict[str, Tensor]:
    """Type and shape of every tensor, from the headers. Raises ConfigError for damaged files, and for quantized weights."""
    found: dict[str, Tensor] = {}
    for path in files:
        found |= {name: Tensor(*about, path) for name, about in header(path, blamed).items()}
    for name, tensor in found.items():
        whole = not tensor.dtype.startswith(("F", "BF"))
        if NARROW.fullmatch(tensor.dtype) and len(tensor.shape) > 1 and (not whole or PACKED.search(name)):
            raise ConfigError(f"{blamed}: {in_full(f'{name} is {tensor.dtype}')}")
    return found


def header(path: Path, blamed: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (type, shape) of the tensors of a file. Raises ConfigError where it is no sound safetensors file."""
    from safetensors import safe_open

    try:
        reading.refuse_kind(os.stat(path), path)
        with safe_open(path, "numpy") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return {name: (str(part.get_dtype()), tuple(part.get_shape())) for name, part in parts.items()}
    except Exception as error:  # safetensors' own, which is no kind of any other
        reason = f"{path.name} is damaged, or no safetensors file: {first_line(error)}"
        raise ConfigError(f"{blamed}: {reason}; fetch it again") from None
