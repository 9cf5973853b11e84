"""A function of the user's own that the YAML names as `module:function`: found, imported, its faults told as the user's.

It is looked for in the working directory, which goes before installed packages of the same name, then among these; never in
a run folder, which keeps a copy, and may be another's. What it raises is told by file and line of the user's code.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import dspref
from dspref.errors import ConfigError

NAME = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"
"""How such a function is written."""
# Modules that dspref and what it stands on import when they need them, beside Python's own: a file of the user's must not
# stand for one.
LIBRARIES = frozenset([
    *("PIL", "accelerate", "bitsandbytes", "click", "datasets", "deepspeed", "flash_attn", "fsspec", "huggingface_hub"),
    *("jinja2", "liger_kernel", "matplotlib", "mlflow", "numpy", "packaging", "pandas", "peft", "pyarrow", "pydantic"),
    *("requests", "rich", "safetensors", "tensorboard", "tokenizers", "torch", "torchvision", "tqdm", "transformers"),
    *("triton", "typer", "wandb", "yaml"),
])  # fmt: skip
PYTHONS = "one of Python's own"
PACKAGES = frozenset(["site-packages", "dist-packages"])
# What every run folder has.
RUN_SETTINGS = "config.resolved.yaml"
# Where the run keeps the sources whose config is being read.
_KEPT_IN: ContextVar[Path | None] = ContextVar("kept_in", default=None)


class Kind(NamedTuple):
    """What functions of the user's own are for."""

    name: str
    folder: str
    """Of a run folder that keeps their sources."""
    example: str


LOSS = Kind("loss", "losses", "my_losses:my_loss")
FORMAT = Kind("format", "formats", "my_formats:my_format")
KINDS = (LOSS, FORMAT)


@dataclass(frozen=True)
class Source:
    """The file that a function of one's own is written in, as it was when it was loaded."""

    path: str
    line: int
    text: str
    sha256: str

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}"


class Used(NamedTuple):
    """A function of the user's own that a config names, at a key of its YAML."""

    key: str
    kind: Kind
    name: str
    source: Source


def kept_at(folder: Path, kind: Kind, name: str) -> Path:
    """Where the run in a folder keeps the source of a function."""
    return folder / kind.folder / f"{name.partition(':')[0]}.py"


@contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    """While this is open, of functions that are not found it is told where the run in `folder` keeps them."""
    token = _KEPT_IN.set(folder)
    try:
        yield
    finally:
        _KEPT_IN.reset(token)


# ---------------------------------------------------------------------------------------------------------------------
# Finding it


@functools.cache
def found(name: str, kind: Kind, folder: str) -> tuple[Callable[..., Any], Source]:
    """The function that `name` means in the working directory `folder`, or among installed packages, and its source. Raises
    ConfigError with the fault and its place, without the key."""
    if not re.fullmatch(NAME, name):
        raise ConfigError(f"must be written module:function{_as_module(name, kind)}, not {name!r}")
    of_module, _, attribute = name.partition(":")
    with _first_on_path(folder):
        module = _imported(of_module, folder)
    if module is None:
        there = f"neither in the working directory ({folder}) nor installed"
        raise ConfigError(f"no module {of_module}, {there}{_kept(name, kind)}")
    value = getattr(module, attribute, None)
    if value is None:
        close = get_close_matches(attribute, [key for key, value in vars(module).items() if callable(value)], n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise ConfigError(f"{module.__file__ or of_module}: has no function {attribute}{hint}")
    function = inspect.unwrap(value) if callable(value) else value
    if not isinstance(function, FunctionType):
        raise ConfigError(f"{module.__file__ or of_module}: {attribute} is no function of Python (def)")
    path = function.__code__.co_filename
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; the source of {attribute} is kept with the run") from None
    text, digest = content.decode("utf-8", "replace"), hashlib.sha256(content).hexdigest()
    return value, Source(path, function.__code__.co_firstlineno, text, digest)


def _as_module(name: str, kind: Kind) -> str:
    """For a file in the place of its module: how that is written."""
    path, _, function = name.rpartition(":")
    meant = f"{path.strip().removeprefix('./').removesuffix('.py').replace('/', '.')}:{function.strip()}"
    return f", such as {meant if re.fullmatch(NAME, meant) else kind.example}"


@contextmanager
def _first_on_path(folder: str) -> Iterator[None]:
    """`folder` before all that is installed, for an import; what that compiles is not written beside the source."""
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(folder)
        sys.dont_write_bytecode = written


def _imported(name: str, folder: str) -> ModuleType | None:
    """A module that is in a folder, or installed; None where there is none."""
    top = name.partition(".")[0]
    here = importlib.machinery.PathFinder.find_spec(top, [folder])
    if here and (run := _run_folder(name, Path(folder))):
        raise ConfigError(
            f"{run} is a run folder, and what lies in one is not run; copy the module elsewhere if you trust it"
        )
    if here and here.origin and (other := _other(top, here.origin)):
        raise ConfigError(f"{here.origin}: {other}; give yours another name")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            return None
        raise ConfigError(told(error)) from None
    except (Exception, SystemExit) as error:
        raise ConfigError(told(error)) from None


def _run_folder(name: str, folder: Path) -> Path | None:
    """The run folder that a module in the working directory lies in: it may be another's, and so may the config that names
    the module there."""
    inner = [folder.joinpath(*name.split(".")[:n]) for n in range(1, name.count(".") + 1)]
    return next((place for place in (*inner, folder, *folder.parents) if (place / RUN_SETTINGS).is_file()), None)


def _other(top: str, origin: str) -> str | None:
    """What else a module of this name is, in words, where a file of the user's would stand for it."""
    if (known := sys.modules.get(top)) is not None:
        path = getattr(known, "__file__", None)
        same = path is not None and os.path.realpath(path) == os.path.realpath(origin)
        return None if same else f"a module {top} is loaded already ({path or PYTHONS})"
    taken = (
        "Python itself" if top in sys.stdlib_module_names else "dspref, or what it stands on," if top in LIBRARIES else ""
    )
    return f"{taken} has a module {top}" if taken else None


def _kept(name: str, kind: Kind) -> str:
    """Where the run keeps it whose config is being read: for people to look at. What lies in a run folder is not run."""
    folder = _KEPT_IN.get()
    if folder is None or not (path := kept_at(folder, kind, name)).is_file():
        return ""
    return f"; the run has it in {path}: copy it here if you trust it"


# ---------------------------------------------------------------------------------------------------------------------
# Its faults


def told(error: BaseException, path: str = "", otherwise: str = "") -> str:
    """An exception in one line: where the user's file raised it, its kind and its words.

    The place is the last that lies in `path`, else the last that is neither Python's nor dspref's, else `otherwise`.
    """
    said = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno or 1}: {type(error).__name__}: {error.msg}"
    ours = str(Path(dspref.__file__).parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((f"{ours}{os.sep}", "<"))]
    last = next((f for f in reversed(frames) if f.filename == path), frames[-1] if frames and not path else None)
    return f"{f'{last.filename}:{last.lineno}' if last else otherwise}: {said}".removeprefix(": ")


# ---------------------------------------------------------------------------------------------------------------------
# What it consists of


def with_imports(name: str, source: Source) -> str:
    """A digest of a function's file and of what that imports, at any depth, from the folder or the package that it lies in:
    of all of the user's that decides what it gives. Of a file alone it is the file's sha256."""
    module = sys.modules[name.partition(":")[0]]
    root = _root(module)
    files, queue = {source.path: source.sha256}, [(source.text, module.__package__ or "")]
    while queue:
        text, package = queue.pop()
        for other in _imported_by(text, package):
            place = getattr(other, "__file__", None)
            if not place or place in files or not place.endswith(".py") or not _is_below(place, root):
                continue
            with suppress(OSError):
                content = Path(place).read_bytes()
                files[place] = hashlib.sha256(content).hexdigest()
                queue.append((content.decode("utf-8", "replace"), other.__package__ or ""))
    if len(files) == 1:
        return source.sha256
    return hashlib.sha256(
        repr(sorted((os.path.relpath(path, root), own) for path, own in files.items())).encode()
    ).hexdigest()


def _root(module: ModuleType) -> Path:
    """The folder whose files are as much the user's as the module: of an installed one, its package alone."""
    own, names = Path(module.__file__ or ""), module.__name__.split(".")
    root = own.parents[len(names) - (own.name != "__init__.py")]
    if not PACKAGES & {*root.parts}:
        return root
    return root / names[0] if len(names) > 1 or own.name == "__init__.py" else own


def _is_below(path: str, root: Path) -> bool:
    return Path(path).is_relative_to(root) and not PACKAGES & {*Path(path).relative_to(root).parts}


def _imported_by(text: str, package: str) -> Iterator[ModuleType]:
    """The modules, of those that are loaded, that a source imports, and the packages that they lie in."""
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            with suppress(ImportError, ValueError):
                own = (
                    importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                    if node.level
                    else node.module
                )
                names = [str(own), *(f"{own}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            above = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
            yield from (module for one in above if (module := sys.modules.get(one)) is not None)
