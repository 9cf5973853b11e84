"""Paths in a config: what they may be, and what they stand for."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

# The longest name of a file, and with its folders, that Linux takes.
NAME_BYTES, PATH_BYTES = 255, 4096
VARIABLE = re.compile(r"\$(\w+|\{[^}]*\}?)")


def expand(path: str) -> str:
    """A path with `~` and `~user` as the home folders that they stand for.

    Raises ValueError, with the remedy, for what would name another file than the user means.
    """
    if not path.strip():
        raise ValueError("is empty; write a path")
    if not path.isprintable():
        raise ValueError("has characters that do not print; choose another path")
    if len(path.encode()) >= PATH_BYTES or any(len(part.encode()) > NAME_BYTES for part in path.split("/")):
        raise ValueError(
            f"longer than a name may be ({NAME_BYTES} bytes, {PATH_BYTES} with its folders); give a shorter one"
        )
    if found := VARIABLE.search(path):
        raise ValueError(f"{found[0]}: variables are not expanded; write the path")
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        name = path.split("/")[0]
        raise ValueError(f"{name}: no such user; write the whole path, or ./{path} for a folder of that name") from None


def _expanded(path: str) -> str:
    try:
        return expand(path)
    except ValueError as error:
        # As a value of the error, as its text would be read as a template.
        raise PydanticCustomError("path", "{reason}", {"reason": str(error)}) from None


def _expanded_unless_template(text: str) -> str:
    return text if "{{" in text or "{%" in text else _expanded(text)


FilePath = Annotated[str, AfterValidator(_expanded)]
"""A file, a folder or a hub id."""
TemplatePath = Annotated[str, AfterValidator(_expanded_unless_template)]
"""A Jinja file, or its text."""


def shipped(path: str) -> Path:
    """`ds_configs/...` and `launch/...` that are absent in the working directory are taken from dspref itself."""
    # Not pathlib, which raises for a name that is too long.
    if not os.path.exists(path) and path.split("/")[0] in ("ds_configs", "launch"):
        package = Path(__file__).parents[1]
        for root in (package.parent, package / "shipped"):
            if os.path.exists(root / path):
                return root / path
    return Path(path)
