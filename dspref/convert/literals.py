"""Values of a Python script as far as they can be known without running it: literals, names that are given one once, and
simple arithmetic and text of these.

What else there is, calls above all, is computed there, and is `Unknown`.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

# Beyond these nobody writes a setting: larger results are not computed.
LARGEST, LONGEST, DEEPEST, MOST_POWER, MOST_NODES = 10**18, 10_000, 40, 64, 10_000
NUMBERS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
CASTS: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "tuple": list, "Path": str}
FORMAT = re.compile(r"[-+ ]?0?\d{0,2},?(\.\d{1,2})?[a-zA-Z%]?")
# Methods by which a list or a mapping becomes another.
CHANGING = {"append", "extend", "insert", "pop", "remove", "clear", "update", "setdefault", "popitem"}


class Unknown(Exception):
    """What only running the script would tell."""


class Values:
    """The values of a script's expressions."""

    def __init__(self, tree: ast.Module) -> None:
        times: dict[str, int] = {}
        self.given: dict[str, ast.expr] = {}
        """Names that are bound once in the script, to an expression."""
        for name, value in _bindings(tree):
            times[name] = times.get(name, 0) + 1
            if value is not None:
                self.given[name] = value
        self.given = {name: value for name, value in self.given.items() if times[name] == 1}
        self._nodes = 0
        self.of_environment = ""
        """The code of the environment variable whose default is in the value that was asked for last."""

    def of(self, node: ast.expr) -> Any:
        """The value of an expression. Raises Unknown."""
        self.of_environment, self._nodes = "", 0
        try:
            value = self._of(node, ())
        except (ArithmeticError, ValueError, TypeError, LookupError, AttributeError, RecursionError, MemoryError):
            raise Unknown from None
        return value

    def _of(self, node: ast.expr, above: tuple[str, ...]) -> Any:
        self._nodes += 1
        if len(above) > DEEPEST or self._nodes > MOST_NODES:
            raise Unknown
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None as value):
                return value
            case ast.Name(id=name) if name in self.given and name not in above:
                return self._of(self.given[name], (*above, name))
            case ast.Attribute() if ast.unparse(node).startswith("torch."):
                return node.attr
            case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
                return [self._of(item, above) for item in items]
            case ast.Dict():
                return self._mapping(node, above)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() | ast.Not() as sign, operand=inner):
                value = self._of(inner, above)
                return not value if isinstance(sign, ast.Not) else -value if isinstance(sign, ast.USub) else +value
            case ast.BinOp(left=left, op=sign, right=right):
                return _computed(sign, self._of(left, above), self._of(right, above))
            case ast.JoinedStr(values=parts):
                return _bounded("".join(self._text(part, above) for part in parts))
            case ast.Subscript(value=inner, slice=key) if ast.unparse(inner) != "os.environ":
                return self._of(inner, above)[self._of(key, above)]
            case ast.Call():
                return self._call(node, above)
        raise Unknown

    def _mapping(self, node: ast.Dict, above: tuple[str, ...]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, value in zip(node.keys, node.values):
            if key is None:
                made |= self._of(value, above)
            else:
                made[str(self._of(key, above))] = self._of(value, above)
        return made

    def _text(self, part: ast.expr, above: tuple[str, ...]) -> str:
        """A part of an f-string."""
        if not isinstance(part, ast.FormattedValue):
            return str(self._of(part, above))
        form = self._of(part.format_spec, above) if part.format_spec else ""
        value = self._of(part.value, above)
        if part.conversion != -1 or not isinstance(value, str | int | float) or not FORMAT.fullmatch(form):
            raise Unknown
        return format(value, form)

    def _call(self, node: ast.Call, above: tuple[str, ...]) -> Any:
        name = ast.unparse(node.func)
        if name == "dict" and not node.args:
            made: dict[str, Any] = {}
            for word in node.keywords:
                made |= {word.arg: self._of(word.value, above)} if word.arg else self._of(word.value, above)
            return made
        if node.keywords:
            raise Unknown
        if name in ("os.environ.get", "os.getenv", "environ.get", "getenv") and len(node.args) == 2:
            if (value := self._of(node.args[1], above)) is None:
                raise Unknown
            self.of_environment = ast.unparse(node)
            return value
        values = [self._of(argument, above) for argument in node.args]
        if name.removeprefix("pathlib.") in CASTS and len(values) == 1:
            return _bounded(CASTS[name.removeprefix("pathlib.")](values[0]))
        if name in ("os.path.join", "path.join") and values and all(isinstance(value, str) for value in values):
            return _bounded("/".join(value.rstrip("/") for value in values[:-1]) + f"/{values[-1]}")
        raise Unknown


def _computed(sign: ast.operator, left: Any, right: Any) -> Any:
    if isinstance(sign, ast.Add) and type(left) is type(right) and isinstance(left, str | list):
        return _bounded(left + right)
    numbers = all(isinstance(value, int | float) for value in (left, right))
    if not numbers or type(sign) not in NUMBERS or (isinstance(sign, ast.Pow) and abs(right) > MOST_POWER):
        raise Unknown
    return _bounded(NUMBERS[type(sign)](_bounded(left), _bounded(right)))


def _bounded(value: Any) -> Any:
    if isinstance(value, complex) or (isinstance(value, int | float) and not abs(value) <= LARGEST):
        raise Unknown
    if isinstance(value, str | list) and len(value) > LONGEST:
        raise Unknown
    return value


def _bindings(tree: ast.Module) -> Iterator[tuple[str, ast.expr | None]]:
    """Every name that is bound or changed anywhere, with the expression where there is one."""
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                yield name, value
            case ast.AnnAssign(target=ast.Name(id=name), value=value):
                if value is not None:
                    yield name, value
            case ast.Assign(targets=targets):
                yield from ((name, None) for target in targets for name in _names(target))
            case ast.AugAssign(target=target) | ast.For(target=target) | ast.comprehension(target=target):
                yield from ((name, None) for name in _names(target))
            case ast.NamedExpr(target=target) | ast.withitem(optional_vars=ast.expr() as target):
                yield from ((name, None) for name in _names(target))
            case ast.Delete(targets=targets):
                yield from ((name, None) for target in targets for name in _names(target))
            case ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, None
            case ast.ExceptHandler(name=str(name)):
                yield name, None
            case ast.alias(name=name, asname=other):
                yield other or name, None
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=method)) if method in CHANGING:
                yield name, None


def _names(target: ast.AST) -> Iterator[str]:
    """The names in a target; of `a.b = 1` and `a[0] = 1` that is `a`."""
    yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))
