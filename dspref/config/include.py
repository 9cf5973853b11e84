"""`include: base.yaml` at the top of a run's file: the keys of another file, or of several in their order, with those of the
including file on top.

A path is relative to the file that names it. Mappings are merged key by key; a list or a value replaces what was there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from dspref import secrets
from dspref.config.paths import expand, shipped
from dspref.config.yaml12 import Position, parse
from dspref.errors import ConfigError

KEY = "include"
MAX_DEPTH, MAX_FILES = 20, 100

Document: TypeAlias = dict[str, Any]
Positions: TypeAlias = dict[tuple, Position]
InFull: TypeAlias = Callable[[tuple, Any], Any]


def read(path: Path, in_full: InFull) -> tuple[Document, Positions, list[Path]]:
    """The document of a file with all that it includes, the place of each key, and the files that were included.

    `in_full` gives what the value at a path stands for, so that a short form can be merged. Raises ConfigError.
    """
    included: list[Path] = []
    document, positions = _read(path, in_full, [], included)
    return document, positions, included


def _read(path: Path, in_full: InFull, above: list[Path], included: list[Path]) -> tuple[Document, Positions]:
    document, positions = parse(path)
    if KEY not in document:
        return document, positions
    asked, place = document.pop(KEY), positions.pop((KEY,))
    base: Document = {}
    where: Positions = {(): positions[()]}
    for name in _names(asked, place):
        inner = _found(name, path, place)
        _refuse_circle(inner, [*above, path], place)
        included.append(inner)
        if len(included) > MAX_FILES:
            raise ConfigError(f"{place}: {KEY}: more than {MAX_FILES} files in all; write their keys into one")
        below, places = _read(inner, in_full, [*above, path], included)
        _merge(base, where, below, places, (), in_full)
    _merge(base, where, document, {k: v for k, v in positions.items() if k[:1] != (KEY,)}, (), in_full)
    return base, where


def _names(asked: Any, place: Position) -> list[str]:
    names = asked if isinstance(asked, list) else [asked]
    if not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{place}: {KEY}: must be the path of a YAML file, or a list of paths")
    return names


def _found(name: str, above: Path, place: Position) -> Path:
    try:
        path = Path(above).parent / expand(name)
        if kind := secrets.kind_of(name):
            raise ValueError(f"holds {kind}; rename the file or its folder")
    except ValueError as error:
        raise ConfigError(f"{place}: {KEY}: {error}") from None
    if not path.exists() and not (path := shipped(name)).exists():
        beside = f"{Path(above).parent / name}"
        raise ConfigError(f"{place}: {KEY}: {beside}: no such file; a path is relative to the file that includes it")
    if path.is_dir():
        raise ConfigError(f"{place}: {KEY}: {path}: is a folder; give the path of a YAML file in it")
    return path


def _refuse_circle(path: Path, above: list[Path], place: Position) -> None:
    chain = [other.resolve() for other in above]
    if path.resolve() in chain:
        circle = [*above[chain.index(path.resolve()) :], path]
        raise ConfigError(f"{place}: {KEY}: goes in a circle: {' -> '.join(map(str, circle))}; drop one of them")
    if len(above) >= MAX_DEPTH:
        raise ConfigError(f"{place}: {KEY}: more than {MAX_DEPTH} files deep; write their keys into one")


def _merge(base: Any, where: Positions, top: Mapping[str, Any], places: Positions, path: tuple, in_full: InFull) -> None:
    """Put `top`, with its `places`, over `base`, with `where`; both stand at `path`."""
    for key, value in top.items():
        here = (*path, key)
        under = in_full(here, base.get(key)) if isinstance(value, dict) else None
        if isinstance(value, dict) and isinstance(under, dict):
            base[key] = under
            where.setdefault(here, places[here])
            _merge(under, where, value, places, here, in_full)
            continue
        for known in [known for known in where if known[: len(here)] == here]:
            del where[known]
        base[key] = value
        where.update({known: place for known, place in places.items() if known[: len(here)] == here})
