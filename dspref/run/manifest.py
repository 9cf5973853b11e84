"""What is a checkpoint, by its name and by what its manifest.json says: on a login node too, without torch.

Only a folder with exactly the name that dspref gives is one, and only what its manifest names belongs to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from dspref.files import read_json, remove
from dspref.reading import are_words, is_count, is_number, is_word

NAME = "manifest.json"


# ---------------------------------------------------------------------------------------------------------------------
# Names


def folder_of(checkpoints: Path, step: int) -> Path:
    """Of the committed checkpoint of a step."""
    return checkpoints / f"step-{step:06d}"


def step_of(folder: Path, prefix: str = "") -> int | None:
    """The step that a folder is the checkpoint of, by its name behind `prefix`; None for any other name."""
    found = re.fullmatch(re.escape(prefix) + r"step-([0-9]{6,18})", folder.name)
    return int(found[1]) if found and folder.name == f"{prefix}step-{int(found[1]):06d}" else None


def committed(checkpoints: Path) -> list[Path]:
    """Folders that bear the name of a committed checkpoint, oldest first. Raises OSError where they cannot be listed."""
    try:
        with os.scandir(checkpoints) as entries:
            found = [Path(entry) for entry in entries if step_of(Path(entry)) is not None and entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(found, key=lambda folder: step_of(folder) or 0)


def free_name(folder: Path) -> Path:
    """A name that nothing has: that of `folder`, with a number behind it where it is taken."""
    found, number = folder, 1
    while os.path.lexists(found):
        number += 1
        found = folder.with_name(f"{folder.name}-{number}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Manifests


def signed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest, with the sha256 of all else that it says."""
    said = {key: value for key, value in manifest.items() if key != "sha256"}
    return said | {"sha256": hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()}


def read(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint says of itself; None where that cannot be read, or was changed."""
    try:
        manifest = read_json(folder / NAME)
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or any(not check(manifest.get(key)) for key, check in KINDS.items()):
        return None
    try:
        whole = signed(manifest)["sha256"] == manifest["sha256"]
    except RecursionError:  # it can be read a little deeper than it can be written
        return None
    return manifest if whole and step_of(folder) == manifest["step"] else None


def newest(checkpoints: Path, run_id: str | None = None) -> dict[str, Any] | None:
    """The newest manifest that can be believed, of this run where its id is given; its files have not been looked at."""
    for folder in reversed(committed(checkpoints)):
        manifest = read(folder)
        if manifest and run_id in (None, manifest["run_id"]):
            return manifest
    return None


def strays(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Files in a checkpoint that its manifest does not name, but for hidden ones, which nothing reads."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink() or path.is_file())
    named = {*manifest["files"], NAME}
    return sorted(str(file) for file in files if str(file) not in named and not file.name.startswith("."))


def link(folder: Path, manifest: Mapping[str, Any], clean: Path) -> None:
    """Make `clean` a folder with the files that the manifest names, and no others."""
    remove(clean)
    clean.mkdir()
    for name in manifest["files"]:
        (clean / name).parent.mkdir(parents=True, exist_ok=True)
        (clean / name).symlink_to((folder / name).absolute())


def are_files(value: Any) -> bool:
    """Relative paths, each with the size and the sha256 of a file."""
    return isinstance(value, dict) and all(_is_inside(name) and _is_hash(entry) for name, entry in value.items())


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name and bool(path.parts)


def _is_hash(entry: Any) -> bool:
    return isinstance(entry, list | tuple) and len(entry) == 2 and is_count(entry[0]) and isinstance(entry[1], str)


# Of a manifest: the keys that are read, and what their values must be.
KINDS: dict[str, Callable[[Any], bool]] = {
    "sha256": is_word,
    "step": is_count,
    "run_id": is_word,
    "content": are_words,
    "config": is_word,
    "world_size": is_count,
    "metrics": lambda value: isinstance(value, dict) and all(v is None or is_number(v) for v in value.values()),
    "files": are_files,
}
