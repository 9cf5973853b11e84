"""The `objective` section, made from the table of losses: a loss's keyword-only arguments are its YAML keys."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, Union, get_origin

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    SerializeAsAny,
    Tag,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    create_model,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from dspref import own_code
from dspref.config.section import Section, one_or_list
from dspref.errors import ConfigError
from dspref.objectives import KEYS, OBJECTIVES, Family, defaults, keys_of, known_keys, losses, own

DEFAULT_OBJECTIVE = "dpo"


class _WithOwn(Section):
    """What an editor knows of a section with a loss of the user's own: keys that only that function has are let pass."""

    model_config = ConfigDict(extra="allow")


def _objective_section(name: str, losses_named: Sequence[str] | None = None) -> type[Section]:
    """The section of an objective; of the keys that losses have, with those of the losses that it names, or of all."""
    family = OBJECTIVES[name]
    fields = _fields(name, family, losses_named or list(family.losses))
    return create_model(f"{name.capitalize()}{'Own' if losses_named else ''}Section", __base__=Section, **fields)


def _fields(name: str, family: Family, names: Sequence[str]) -> dict[str, Any]:
    loss_type: Any = Literal[(*family.losses, *filter(own.is_own, names))]
    named = Annotated[Literal[name], Field(description="The family of objectives; the other keys depend on it.")]
    fields: dict[str, Any] = {"name": (named, DEFAULT_OBJECTIVE if name == DEFAULT_OBJECTIVE else ...)}
    first = next(iter(family.losses))
    about = Field(description=KEYS["loss_type"].meaning)
    fields["loss_type"] = (Annotated[_one_or_several(loss_type) if family.mixes else loss_type, about], first)
    if family.mixes:
        weights = list[Annotated[float, Field(ge=0)]] | None
        fields["loss_weights"] = (Annotated[weights, Field(description=KEYS["loss_weights"].meaning)], None)
    functions = (family.assemble, *(family.loss(loss).function for loss in names))
    meanings = known_keys(name, names)
    for key, of in defaults(name, names).items():
        kinds = [_named(keys_of(function)[key].annotation) for function in functions if key in keys_of(function)]
        # Where losses differ in their default, None stands for the loss's own.
        default = of[0] if len(of) == 1 else None
        fields[key] = (_as_field(kinds, meanings[key].meaning, optional=len(of) > 1), default)
    return fields


def _for_editors(name: str) -> Any:
    """The section of an objective with a loss of the user's own, for the JSON Schema."""
    family, mine = OBJECTIVES[name], {"pattern": f"^{own_code.NAME}$"}
    one = Annotated[str, Field(pattern=mine["pattern"])]
    several = Annotated[list[str], Field(json_schema_extra={"contains": {"type": "string", **mine}})]
    fields = _fields(name, family, [])
    about = Field(description=KEYS["loss_type"].meaning)
    fields["loss_type"] = (Annotated[Union[one, several] if family.mixes else one, about], ...)
    return create_model(f"{name.capitalize()}WithOwnLoss", __base__=_WithOwn, **fields)


def own_section(value: Any) -> type[Section] | None:
    """The section for what is written in it, where that names a loss of the user's own; else None.

    Raises ValidationError where such a loss cannot be had, with what is wrong as a complaint of its `loss_type`.
    """
    name, written = objective_name(value), value.get("loss_type") if isinstance(value, Mapping) else None
    names = [loss for loss in (written if isinstance(written, list) else [written]) if isinstance(loss, str)]
    if not isinstance(name, str) or name not in OBJECTIVES or not any(map(own.is_own, names)):
        return None
    family = OBJECTIVES[name]
    if isinstance(written, list) and not family.mixes:
        return None  # which is refused as such
    for loss in names:
        others = [family.assemble, *(family.losses[other].function for other in names if other in family.losses)]
        if own.is_own(loss) and (fault := _fault(family, loss, others)):
            place = ("loss_type", written.index(loss)) if isinstance(written, list) else ("loss_type",)
            told = PydanticCustomError("own_loss", "{reason}", {"reason": fault})
            raise ValidationError.from_exception_data(name, [InitErrorDetails(type=told, loc=place, input=loss)])
    return _section_of(name, tuple(loss for loss in dict.fromkeys(names) if own.is_own(loss) or loss in family.losses))


def _fault(family: Family, loss_type: str, others: Sequence[Any]) -> str | None:
    """What is wrong with a loss of the user's own beside these functions, whose keys it may share."""
    if not family.own_of:
        takers = [name for name, other in OBJECTIVES.items() if other.own_of]
        return f"a loss of your own goes with name: {', '.join(takers)}"
    try:
        keys = keys_of(family.loss(loss_type).function)
    except ConfigError as error:
        return str(error)
    where = own.source(loss_type).where
    for key, parameter in keys.items():
        if hasattr(Section, key):
            return f"{where}: {key} is no name that a key can have; give it another"
        types = {own.parted(_named(keys_of(other)[key].annotation))[0] for other in others if key in keys_of(other)}
        if types - {own.parted(parameter.annotation)[0]}:
            return f"{where}: the key {key} is of another type in {loss_type} than beside it; give it that, or another name"
    return None


@cache
def _section_of(name: str, losses_named: tuple[str, ...]) -> type[Section]:
    return _objective_section(name, losses_named)


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


def _as_field(kinds: Sequence[Any], meaning: str, optional: bool) -> Any:
    """The pydantic type of a key that some losses take, with None as a value where `optional`.

    Of ranges such as `Annotated[float, {"gt": 0}]` it has what all share; `checks` holds each loss to its own.
    """
    bounds = [kind.__metadata__[0] if get_origin(kind) is Annotated else {} for kind in kinds]
    if any("ge" in bound for bound in bounds):  # the weaker of >= 0 and > 0
        bounds = [{"ge" if name == "gt" else name: limit for name, limit in bound.items()} for bound in bounds]
    shared = {bound: limit for bound, limit in bounds[0].items() if all(other.get(bound) == limit for other in bounds)}
    inner = kinds[0].__origin__ if get_origin(kinds[0]) is Annotated else kinds[0]
    return Annotated[inner | None if optional else inner, Field(**shared, description=meaning)]


def _with_own(value: Any, otherwise: ValidatorFunctionWrapHandler) -> Any:
    section = own_section(value)
    return section.model_validate(value) if section else otherwise(value)


OBJECTIVE_SECTIONS = {name: _objective_section(name) for name in OBJECTIVES}
_Ours: Any = Annotated[
    Union[tuple(Annotated[section, Tag(name)] for name, section in OBJECTIVE_SECTIONS.items())],
    Discriminator(objective_name),
]
_Theirs: Any = Union[tuple(_for_editors(name) for name, family in OBJECTIVES.items() if family.own_of)]
ObjectiveSection = Annotated[
    SerializeAsAny[_Ours],  # the keys of a user's loss are known to its own section alone
    WrapValidator(_with_own, json_schema_input_type=Union[_Ours, _Theirs]),
]


def objective_section(value: Any) -> type[Section] | None:
    """The section that the keys of an objective belong to; None for one that there is not."""
    name = objective_name(value)
    try:
        return own_section(value) or (OBJECTIVE_SECTIONS.get(name) if isinstance(name, str) else None)
    except ValidationError:
        return OBJECTIVE_SECTIONS.get(str(name))
