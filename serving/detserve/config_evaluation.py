"""The assignments of a config, evaluated without Python's own evaluator: what is not data is refused by name.

Known are constants, containers and their comprehensions, arithmetic, names assigned before, values of the bases, and
the few methods by which configs change a dict or a list.
"""

import ast
import operator
from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import Any

from detserve.errors import SpecError

BASE = "_base_"
_LARGEST = 1_000_000
_MOST_VALUES = 300_000
_STEPS = 200_000
_DEEPEST = 100
_LARGEST_NUMBER = 2**1024
_CHANGING: dict[type, set[str]] = {dict: {"update", "pop"}, list: {"append", "extend", "insert", "pop"}}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"dict": dict, "list": list, "tuple": tuple, "len": len, "float": float}
_OPERATORS: dict[type[ast.operator] | type[ast.unaryop], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}


class ConfigError(SpecError):
    """A config cannot be read, asks for code that is not allowed, or does not describe a detector."""


class NotLiteralError(ConfigError):
    """A config needs more than evaluating its assignments: it would have to be run."""


class Budget:
    """Bounds what a config holds, counted as if nothing were shared: a few lines can name a value a billion times.

    Args:
        path: of the config, for messages.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._left = _MOST_VALUES

    def count(self, value: Any, depth: int = 0) -> None:
        """Count a value with all that lies in it.

        Raises:
            ConfigError: there are too many, or they lie too deep.
        """
        self._left -= 1
        if isinstance(value, str):
            self._left -= len(value) // 64
        if self._left < 0 or depth > _DEEPEST:
            raise ConfigError(
                f"config {self.path.name}: got more than {_MOST_VALUES} values, or more than {_DEEPEST} within each "
                "other."
            )
        if isinstance(value, dict):
            for key, inner in value.items():
                self.count(key, depth + 1)
                self.count(inner, depth + 1)
        elif isinstance(value, list | tuple | set):
            for inner in value:
                self.count(inner, depth + 1)


class Evaluation:
    """A config's assignments, evaluated from top to bottom."""

    def __init__(self, path: Path, bases: dict[str, Any]) -> None:
        self._path = path
        self._names: dict[str, Any] = {BASE: bases}
        self._steps = 0

    def run(self, tree: ast.Module) -> dict[str, Any]:
        """Evaluate a file; return what it names.

        Raises:
            NotLiteralError: a statement is more than an assignment of data.
            ConfigError: one fails.
        """
        for statement in tree.body:
            if isinstance(statement, ast.Expr):
                self._change(statement.value)
                continue
            if not isinstance(statement, ast.Assign):
                raise self._not_literal(statement)
            if ast.unparse(statement.targets[0]) == BASE:
                continue
            value = self.value(statement.value)
            for target in statement.targets:
                self._assign(target, value)
        return {name: value for name, value in self._names.items() if name != BASE and not name.startswith("__")}

    def _assign(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            self._names[target.id] = value
        elif isinstance(target, ast.Tuple) and isinstance(value, list | tuple) and len(target.elts) == len(value):
            for part, inner in zip(target.elts, value, strict=True):
                self._assign(part, inner)
        elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name | ast.Subscript):
            try:
                self.value(target.value)[self.value(target.slice)] = value
            except (TypeError, LookupError) as error:
                raise ConfigError(f"config {self._path.name}, line {target.lineno}: {error}.") from error
        elif isinstance(target, ast.Attribute) and isinstance(owner := self.value(target.value), dict):
            owner[target.attr] = value
        else:
            raise self._not_literal(target)

    def _change(self, node: ast.expr) -> None:
        """A statement that is no assignment: a docstring, or a method that changes a dict or a list."""
        match node:
            case ast.Constant():
                return
            case ast.Call(func=ast.Attribute(value=inner, attr=name)):
                owner = self.value(inner)
                if type(owner) in _CHANGING and name in _CHANGING[type(owner)]:
                    options = {str(one.arg): self.value(one.value) for one in node.keywords}
                    given = [self.value(one) for one in node.args]
                    try:
                        _small(range(len(owner) + sum(len(_small(one)) for one in given if isinstance(one, Sized))))
                        getattr(owner, name)(*given, **options)
                    except (TypeError, LookupError, ValueError) as error:
                        raise ConfigError(f"config {self._path.name}, line {node.lineno}: {error}.") from error
                    return
        raise self._not_literal(node)

    def value(self, node: ast.expr) -> Any:
        """Evaluate an expression.

        Raises:
            NotLiteralError: it is more than data.
        """
        self._steps += 1
        if self._steps > _STEPS:
            raise ConfigError(f"config {self._path.name}: needs more than {_STEPS} steps.")
        try:
            found = self._value(node)
        except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError, MemoryError) as error:
            raise ConfigError(
                f"config {self._path.name}, line {node.lineno}: {type(error).__name__}: {error}."
            ) from error
        if isinstance(found, str | list | tuple) and len(found) > _LARGEST:
            raise ConfigError(f"config {self._path.name}, line {node.lineno}: got {len(found)} elements.")
        if isinstance(found, int) and abs(found) > _LARGEST_NUMBER:
            raise ConfigError(f"config {self._path.name}, line {node.lineno}: got a number that is too large.")
        return found

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=str() | int() | float() | bool() | None):
                return node.value
            case ast.Name() if node.id in self._names:
                return self._names[node.id]
            case ast.List() | ast.Tuple() | ast.Set() if not any(isinstance(one, ast.Starred) for one in node.elts):
                kind = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
                return kind(self.value(one) for one in node.elts)
            case ast.Dict():
                return self._joined((key, inner) for key, inner in zip(node.keys, node.values, strict=True))
            case ast.Call(func=ast.Name(id="dict"), args=[]):
                return self._joined(
                    (None if one.arg is None else ast.Constant(one.arg), one.value) for one in node.keywords
                )
            case ast.Call(
                func=ast.Name(id="dict" | "list" | "tuple" | "len" | "float" as name), args=[inner], keywords=[]
            ):
                return _FUNCTIONS[name](_small(self.value(inner)))
            case ast.Call(func=ast.Name(id="range"), keywords=[]):
                return range(*(self.value(one) for one in node.args))
            case ast.Call(func=ast.Attribute(attr="copy", value=inner), args=[], keywords=[]):
                return dict(_small(self.value(inner)))
            case ast.ListComp():
                return [self.value(node.elt) for _ in self._rounds(node.generators)]
            case ast.DictComp():
                return {self.value(node.key): self.value(node.value) for _ in self._rounds(node.generators)}
            case ast.UnaryOp() if type(node.op) in _OPERATORS:
                return _OPERATORS[type(node.op)](self.value(node.operand))
            case ast.BinOp() if type(node.op) in _OPERATORS:
                return self._computed(node)
            case ast.Subscript(slice=ast.Slice() as part):
                bounds = [None if one is None else self.value(one) for one in (part.lower, part.upper, part.step)]
                return self.value(node.value)[slice(*bounds)]
            case ast.Subscript():
                return self.value(node.value)[self.value(node.slice)]
            case ast.Attribute() if isinstance(owner := self.value(node.value), dict):
                return owner[node.attr]
            case ast.JoinedStr():
                parts = [self.value(one) for one in node.values]
                _small(range(sum(len(part) for part in parts)))
                return "".join(parts)
            case ast.FormattedValue(conversion=-1, format_spec=None):
                shown = self.value(node.value)
                Budget(self._path).count(shown)
                return str(shown)
            case _:
                raise self._not_literal(node)

    def _rounds(self, generators: list[ast.comprehension]) -> Iterator[None]:
        """Go through a comprehension's rounds, its names bound; they are gone afterwards."""
        first, *others = generators
        if first.ifs or first.is_async:
            raise self._not_literal(first.target)
        before = dict(self._names)
        self._steps += len(before) // 64
        for item in self.value(first.iter):
            self._assign(first.target, item)
            if others:
                yield from self._rounds(others)
            else:
                yield
        self._names = before

    def _joined(self, pairs: Iterator[tuple[ast.expr | None, ast.expr]]) -> dict[Any, Any]:
        """A dict display; a missing key stands for ``**``."""
        joined: dict[Any, Any] = {}
        for key, inner in pairs:
            joined |= self.value(inner) if key is None else {self.value(key): self.value(inner)}
        return joined

    def _computed(self, node: ast.BinOp) -> Any:
        left, right = self.value(node.left), self.value(node.right)
        sizes = [len(one) for one in (left, right) if isinstance(one, str | list | tuple)]
        if isinstance(node.op, ast.Mult) and sizes:
            times = next((one for one in (left, right) if isinstance(one, int)), 1)
            if sizes[0] * times > _LARGEST:
                raise ValueError("too large")
        if isinstance(node.op, ast.Pow) and (abs(right) > 64 or abs(left) > _LARGEST):
            raise ValueError("too large")
        if isinstance(node.op, ast.Mod) and not all(isinstance(one, int | float) for one in (left, right)):
            raise self._not_literal(node)
        return _OPERATORS[type(node.op)](left, right)

    def _not_literal(self, node: ast.AST) -> NotLiteralError:
        source = ast.unparse(node).partition("\n")[0]
        return NotLiteralError(
            f"config {self._path.name}, line {getattr(node, 'lineno', 0)}: "
            f"{source[:80]!r} is more than an assignment of data."
        )


def _small(value: Any) -> Any:
    """Give back what is about to be copied.

    Raises:
        ValueError: it has too many elements.
    """
    if isinstance(value, Sized) and len(value) > _LARGEST:
        raise ValueError("too large")
    return value
