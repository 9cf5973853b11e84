"""The `objective` section, made from the table of losses: a loss's keyword-only arguments are its YAML keys."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_origin

from pydantic import Discriminator, Field, Tag, create_model

from dspref.config.section import Section, one_or_list
from dspref.objectives import KEYS, OBJECTIVES, Family, defaults, keys_of, losses

DEFAULT_OBJECTIVE = "dpo"


def _objective_section(name: str, family: Family) -> type[Section]:
    loss_type: Any = Literal[tuple(family.losses)]
    named = Annotated[Literal[name], Field(description="The family of objectives; the other keys depend on it.")]
    fields: dict[str, Any] = {"name": (named, DEFAULT_OBJECTIVE if name == DEFAULT_OBJECTIVE else ...)}
    first = next(iter(family.losses))
    about = Field(description=KEYS["loss_type"].meaning)
    fields["loss_type"] = (Annotated[_one_or_several(loss_type) if family.mixes else loss_type, about], first)
    if family.mixes:
        weights = list[Annotated[float, Field(ge=0)]] | None
        fields["loss_weights"] = (Annotated[weights, Field(description=KEYS["loss_weights"].meaning)], None)
    functions = (family.assemble, *(loss.function for loss in family.losses.values()))
    for key, of in defaults(name, family.losses).items():
        kinds = [_named(keys_of(function)[key].annotation) for function in functions if key in keys_of(function)]
        # Where losses differ in their default, None stands for the loss's own.
        default = of[0] if len(of) == 1 else None
        fields[key] = (_as_field(kinds, key, optional=len(of) > 1), default)
    return create_model(f"{name.capitalize()}Section", __base__=Section, **fields)


def objective_name(value: Any) -> str | None:
    if isinstance(value, Mapping):
        return value.get("name", DEFAULT_OBJECTIVE)
    return getattr(value, "name", None)


def _one_or_several(kind: Any) -> Any:
    several = Annotated[list[kind], Field(min_length=1)]
    return Annotated[Union[Annotated[kind, Tag("one")], Annotated[several, Tag("many")]], Discriminator(one_or_list)]


def _named(annotation: Any) -> Any:
    """The type that an annotation's source text names: one of `dspref.objectives.losses`, or a built-in one."""
    return annotation if not isinstance(annotation, str) else vars(losses).get(annotation) or vars(builtins)[annotation]


def _as_field(kinds: Sequence[Any], key: str, optional: bool) -> Any:
    """The pydantic type of a key that some losses take, with None as a value where `optional`.

    Of ranges such as `Annotated[float, {"gt": 0}]` it has what all share; `checks` holds each loss to its own.
    """
    bounds = [kind.__metadata__[0] if get_origin(kind) is Annotated else {} for kind in kinds]
    if any("ge" in bound for bound in bounds):  # the weaker of >= 0 and > 0
        bounds = [{"ge" if name == "gt" else name: limit for name, limit in bound.items()} for bound in bounds]
    shared = {bound: limit for bound, limit in bounds[0].items() if all(other.get(bound) == limit for other in bounds)}
    inner = kinds[0].__origin__ if get_origin(kinds[0]) is Annotated else kinds[0]
    return Annotated[inner | None if optional else inner, Field(**shared, description=KEYS[key].meaning)]


OBJECTIVE_SECTIONS = {name: _objective_section(name, family) for name, family in OBJECTIVES.items()}
ObjectiveSection = Annotated[
    Union[tuple(Annotated[section, Tag(name)] for name, section in OBJECTIVE_SECTIONS.items())],
    Discriminator(objective_name),
]
