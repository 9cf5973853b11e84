"""What all sections of the YAML file are: strict, frozen pydantic models whose docstrings explain their keys."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the config: strict types, no unknown keys, immutable, each key documented by the text below it."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


def one_or_list(value: Any) -> str:
    return "many" if isinstance(value, list) else "one"
