"""What all sections of the YAML file are: strict, frozen pydantic models whose docstrings explain their keys."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from dspref.config.numbers import as_wanted


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

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, values: Any) -> Any:
        """`16k` is a number where a key takes one."""
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        return {
            key: as_wanted(str(key), value, fields[key].annotation) if key in fields else value
            for key, value in values.items()
        }


def one_or_list(value: Any) -> str:
    return "many" if isinstance(value, list) else "one"
