"""Names of a package that are imported when they are asked for: a door may show what takes seconds to load."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def lazily(package: str, **chapters: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package; `chapters`: for each name that it shows the module that has it, as `module` or, where
    it has another name there, `module:name`."""

    def get(name: str) -> Any:
        if name not in chapters:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, own = chapters[name].partition(":")
        return getattr(importlib.import_module(module), own or name)

    return get
