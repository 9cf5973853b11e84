"""A loss of the user's own: a function that the YAML names as `module:function`, found, looked at, and made a `Loss`.

`own_code` finds it. Its keyword-only arguments are YAML keys, as those of dspref's own losses are. What it does wrong is
told as the user's, by file and line, whether it is loaded, tried out before the run or called in a step. Torch is imported
only where there is such a loss.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import os
from collections.abc import Callable, Collection, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from dspref import own_code
from dspref.errors import ConfigError
from dspref.objectives import losses
from dspref.objectives.families import Key, Loss, component
from dspref.own_code import Source, told

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

# Keys of the section itself; and `loss/nll`, which is logged already.
RESERVED, LOGGED = {"name", "loss_type", "loss_weights"}, {"nll"}
# A key that a family has too and hands on: the scale of the logged rewards.
SHARED = {"beta"}
# An attribute of a function that says that it looks at all pairs of a step.
COUPLES = "couples"
KINDS = (float, int, bool, str)
PLAIN = "float, int, bool, str, Literal[...], or a range of dspref.objectives.losses such as Positive"


def is_own(loss_type: Any) -> bool:
    """Whether a `loss_type` means a function of the user's; whether it is spelt as one must be is for `loss` to say."""
    return isinstance(loss_type, str) and ":" in loss_type


def source(loss_type: str) -> Source:
    return _found(loss_type, os.getcwd())[1]


def loss(loss_type: str, inputs: Sequence[str], normaliser: str, taken: Collection[str]) -> Loss:
    """The row of the table for a function of the user's. Raises ConfigError with the fault and its place, without the key.

    `inputs`: names of what it is a function of; `normaliser`: what it sees of an answer; `taken`: keys of its family.
    """
    return _loss(loss_type, os.getcwd(), tuple(inputs), normaliser, frozenset(taken))


@functools.cache
def _loss(loss_type: str, folder: str, inputs: tuple[str, ...], normaliser: str, taken: frozenset[str]) -> Loss:
    function, written = _found(loss_type, folder)
    if component(loss_type) in LOGGED:
        raise ConfigError(f"{written.where}: loss/{component(loss_type)} is a metric of dspref's; give it another name")
    keys = _keys(function, written, inputs)
    for key in keys:
        if key in RESERVED | (taken - SHARED) or key.startswith("_"):
            raise ConfigError(f"{written.where}: {key} is no name for a key of it, as the section has one; give it another")
    checked = _checked(loss_type, function, written, list(keys.values()))
    # Any f'(u) can take the place of log u: what becomes of the loss then is for its author to know. One that looks at all
    # pairs of a step may order them, so that a value belongs to no pair.
    couples = getattr(function, COUPLES, False) is True
    of_keys = {key: Key(f"A key of {loss_type}.") for key in keys}
    targeted = "ratios" in inputs  # whose target it may read
    return Loss(checked, normaliser, couples=couples, ordered=couples, targeted=targeted, divergent=True, keys=of_keys)


def _found(loss_type: str, folder: str) -> tuple[Callable[..., Any], Source]:
    import torch  # noqa: F401  before a file there can stand for one of its own modules

    return own_code.found(loss_type, own_code.LOSS, folder)


# ---------------------------------------------------------------------------------------------------------------------
# Its keys


def _keys(function: Callable, written: Source, inputs: Sequence[str]) -> dict[str, inspect.Parameter]:
    """Its keyword-only arguments, with annotations as types."""
    given = list(inspect.signature(function).parameters.values())
    wanted = f"({', '.join(inputs)}, *, key: float = 1.0, ...)"
    for p in given:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            sign = "*" if p.kind is p.VAR_POSITIONAL else "**"
            raise ConfigError(f"{written.where}: takes {sign}{p.name}, and must be {wanted}")
    positional = [p for p in given if p.kind is not p.KEYWORD_ONLY]
    if len(positional) != len(inputs):
        surplus = next((p.name for p in positional[len(inputs) :] if p.default is not p.empty), None)
        more = f"; a * before {surplus} makes it a key" if surplus else ""
        names = ", ".join(p.name for p in positional) or "nothing"
        raise ConfigError(f"{written.where}: is a function of {names}, and must be {wanted}{more}")
    return {p.name: _key(p, function, written) for p in given if p.kind is p.KEYWORD_ONLY}


def _key(parameter: inspect.Parameter, function: Callable, written: Source) -> inspect.Parameter:
    """A key with its type for an annotation. Raises ConfigError where it has none, or no default that fits."""
    name, kind, default = parameter.name, parameter.annotation, parameter.default
    if kind is parameter.empty or default is parameter.empty:
        lacking = " and ".join(w for w, x in (("type", kind), ("default", default)) if x is parameter.empty)
        raise ConfigError(f"{written.where}: the key {name} has no {lacking}; write {name}: float = 1.0")
    if isinstance(kind, str):
        names = vars(builtins) | vars(losses) | getattr(inspect.unwrap(function), "__globals__", {})
        try:
            kind = get_type_hints(SimpleNamespace(__annotations__={name: kind}), names, include_extras=True)[name]
        except Exception:
            raise ConfigError(f"{written.where}: the key {name}: {kind} is no type; give it {PLAIN}") from None
    base, optional, bounds = parted(kind)
    if base is None or (optional and default is not None):
        why = "a key that may be null has null as its default" if optional and base else f"give it {PLAIN}"
        raise ConfigError(f"{written.where}: the key {name} is of type {_written(kind)}; {why}")
    values = get_args(base) if get_origin(base) is Literal else ()
    fits = default in values if values else _is_a(default, base) and losses.exceeded(default, bounds) is None
    if not fits and not (optional and default is None):
        raise ConfigError(f"{written.where}: the key {name} has the default {default!r}, which its type does not allow")
    return parameter.replace(annotation=kind)


def parted(kind: Any) -> tuple[Any, bool, dict[str, float]]:
    """(type, whether None is allowed, bounds) of a key; the type is None where it is none that a YAML key can have."""
    bounds = {}
    if get_origin(kind) is Annotated:
        bounds, *more = kind.__metadata__
        kind = kind.__origin__
        if more or not isinstance(bounds, dict) or not bounds.keys() <= losses.BOUNDS.keys():
            return None, False, {}
        bounded = {part for part in get_args(kind) or (kind,) if part is not type(None)}
        if not bounded <= {int, float}:
            return None, False, {}
    optional = get_origin(kind) in (Union, type(int | None)) and type(None) in get_args(kind)
    if optional:
        kind, *more = (part for part in get_args(kind) if part is not type(None))
        if more:
            return None, optional, {}
    literal = get_origin(kind) is Literal and all(isinstance(value, str | int) for value in get_args(kind))
    return (kind if literal or kind in KINDS else None), optional, bounds


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def _written(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)


# ---------------------------------------------------------------------------------------------------------------------
# Calling it


def _checked(
    loss_type: str, function: Callable[..., Any], written: Source, keys: list[inspect.Parameter]
) -> Callable[..., Float[Tensor, "P"]]:
    """The function, whose faults are told as the user's: a ConfigError that names its file and line."""

    def called(*inputs: Any, **given: Any) -> Float[Tensor, "P"]:
        try:
            values = function(*inputs, **given)
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError":  # for which dspref has words of its own
                raise
            raise ConfigError(f"objective.loss_type: {loss_type}: {told(error, written.path, written.where)}") from error
        if fault := _fault(values, inputs[0]):
            raise ConfigError(f"objective.loss_type: {loss_type}: {written.where}: {fault}")
        return values

    called.__name__, called.__doc__ = component(loss_type), inspect.getdoc(function)
    called.__signature__ = inspect.Signature(keys)  # type: ignore[attr-defined]
    return called


def _fault(values: Any, first: Any) -> str | None:
    """What is wrong with what a loss returns, beside its numbers."""
    import torch

    scores: Tensor = first.chosen if isinstance(first, losses.Ratios) else first
    if not isinstance(values, torch.Tensor):
        return f"must return a tensor of shape [{len(scores)}], a value for each pair, not {type(values).__name__}"
    if values.shape != scores.shape:
        shape = "a single number" if not values.shape else f"shape {list(values.shape)}"
        return f"must return a value for each pair, unreduced, of shape [{len(scores)}]; it returns {shape}"
    if values.device != scores.device:
        return f"returns a tensor on {values.device} for one on {scores.device}"
    if scores.requires_grad and torch.is_grad_enabled() and not values.requires_grad:
        return "what it returns has no gradient; it must be computed from its arguments by torch, without detach() or item()"
    return None
