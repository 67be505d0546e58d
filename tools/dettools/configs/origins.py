"""Where each value of a config is set: the file and the line, found in the sources without running them.

    CONFIG.py ─► its assignments, line by line ─┐
    _base_ files, the same                      ├─► merged as MMEngine merges values ─► a tree of places
    CONFIG.yaml, .json: the parser's marks    ──┘

The values come from `detserve.mmdet_config`; the tree only says where. What it cannot follow (a comprehension, a
list that is computed) has the place of the value that it lies in.
"""

import ast
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from detserve.config_evaluation import BASE, Evaluation
from detserve.mmdet_config import ConfigError

Key = str | int
_DELETE = "_delete_"
_VARIABLE = re.compile(r"\{\{\s*([\w.]+)\s*\}\}")


@dataclass(frozen=True)
class Place:
    """A line of a file; line 0 for what has no lines, such as an option of the command line."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True)
class Origins:
    """The places of a value and of all that lies in it.

    Attributes:
        place: where the value is set.
        children: of a dict by key, of a list by number. Two names of one value share it, as they share the value.
        kind: ``dict``, ``list`` or an empty string.
        deletes: whether it replaces its base's dict instead of joining it.
        replaced: the places whose values it took the place of, the latest first.
    """

    place: Place
    children: dict[Any, "Origins"] = field(default_factory=dict)
    kind: str = ""
    deletes: bool = False
    replaced: tuple[Place, ...] = ()

    def of(self, path: tuple[Key, ...]) -> "Origins":
        """Return the places of the value at a path, or of the nearest one around it that is known."""
        found = self
        for key in path:
            if key not in found.children:
                break
            found = found.children[key]
        return found

    def knows(self, path: tuple[Key, ...]) -> bool:
        """Whether the very place of the value at a path is known."""
        found = self
        for key in path:
            if key not in found.children:
                return False
            found = found.children[key]
        return True


def read_origins(path: Path, label: Callable[[Path], str] | None = None) -> Origins:
    """Find where a config's values are set.

    Args:
        path: a config that `detserve.mmdet_config.read_config` has read.
        label: how a file is called in the places; by default its path, relative where that is shorter.

    Raises:
        ConfigError: a file cannot be read or parsed any more.
    """
    return _read(path.resolve(), label or shown_path)


def shown_path(path: Path) -> str:
    """Return a path relative to the working directory where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


def merged(over: Origins, under: Origins) -> Origins:
    """Merge as MMEngine merges values: dicts join, everything else replaces."""
    children = dict(under.children)
    for key, child in over.children.items():
        below = children.get(key)
        if below is None:
            children[key] = child
        elif child.kind == below.kind == "dict" and not child.deletes:
            children[key] = merged(child, below)
        else:
            children[key] = replace(child, replaced=(*child.replaced, below.place, *below.replaced))
    return replace(over, children=children, replaced=(*over.replaced, under.place, *under.replaced))


def _read(path: Path, label: Callable[[Path], str]) -> Origins:
    try:
        text = path.read_text("utf-8")
        if path.suffix == ".py":
            file = _PythonFile(path, label)
            return file.read(ast.parse(text))
        return _marked(path, text, label)
    except (OSError, ValueError, SyntaxError) as error:
        raise ConfigError(f"config {path.name}: cannot be read again ({error}).") from error


def _bases(names: Any, path: Path, label: Callable[[Path], str]) -> Origins:
    children: dict[Any, Origins] = {}
    for name in [names] if isinstance(names, str) else names:
        children |= _read((path.parent / name).resolve(), label).children
    return Origins(Place(label(path), 1), children, "dict")


class _PythonFile:
    """One file's assignments, followed from top to bottom."""

    def __init__(self, path: Path, label: Callable[[Path], str]) -> None:
        self._path = path
        self._label = label
        self._names: dict[str, Origins] = {BASE: Origins(Place(label(path), 1), {}, "dict")}

    def read(self, tree: ast.Module) -> Origins:
        """Return the places of what the file and its bases set."""
        if len(tree.body) == 1 and isinstance(tree.body[0], ast.Expr) and isinstance(tree.body[0].value, ast.Dict):
            return self._origins(tree.body[0].value)
        bases = self._names[BASE]
        for statement in tree.body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == BASE:
                bases = _bases(Evaluation(self._path, {}).value(statement.value), self._path, self._label)
        self._names[BASE] = bases
        for statement in tree.body:
            if isinstance(statement, ast.Expr):
                self._change(statement.value)
            elif isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) != BASE:
                for target in statement.targets:
                    self._assign(target, self._origins(statement.value))
        own = {name: origins for name, origins in self._names.items() if name != BASE and not name.startswith("__")}
        return merged(Origins(bases.place, own, "dict"), bases)

    def _place(self, node: ast.AST) -> Place:
        return Place(self._label(self._path), getattr(node, "lineno", 1))

    def _assign(self, target: ast.expr, origins: Origins) -> None:
        if isinstance(target, ast.Name):
            self._names[target.id] = origins
        elif isinstance(target, ast.Tuple):
            for number, part in enumerate(target.elts):
                self._assign(part, origins.children.get(number) or Origins(self._place(target)))
        elif isinstance(target, ast.Subscript | ast.Attribute):
            key = target.attr if isinstance(target, ast.Attribute) else _constant(target.slice)
            owner = self._origins(target.value)
            before = owner.children.get(key)
            owner.children[key] = replace(origins, replaced=(before.place, *before.replaced) if before else ())

    def _change(self, node: ast.expr) -> None:
        """Follow a method that changes a dict or a list."""
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            return
        owner = self._origins(node.func.value)
        given = [self._origins(one) for one in node.args]
        match node.func.attr:
            case "update":
                for one in given:
                    owner.children.update(one.children)
                owner.children.update({one.arg: self._set_at(one.value, one.value) for one in node.keywords if one.arg})
            case "append":
                owner.children[len(owner.children)] = replace(given[0], place=self._place(node))
            case "extend":
                start = len(owner.children)
                owner.children.update({start + number: one for number, one in given[0].children.items()})
            case _ if owner.kind == "dict" and node.args:
                owner.children.pop(_constant(node.args[0]), None)
            case _:
                owner.children.clear()  # The numbers of the list are others now.

    def _set_at(self, value: ast.expr, key: ast.AST) -> Origins:
        """Return a value's places; the value itself is set where its key stands."""
        return replace(self._origins(value), place=self._place(key))

    def _origins(self, node: ast.expr) -> Origins:
        place = self._place(node)
        match node:
            case ast.Dict():
                return self._dict(place, list(zip(node.keys, node.values, strict=True)))
            case ast.Call(func=ast.Name(id="dict"), args=[]):
                pairs = [(ast.Constant(one.arg) if one.arg else None, one.value) for one in node.keywords]
                return self._dict(place, pairs)
            case (
                ast.Call(func=ast.Name(id="dict" | "list" | "tuple"), args=[inner])
                | ast.Call(func=ast.Attribute(attr="copy", value=inner), args=[])
            ):
                found = self._origins(inner)
                return Origins(place, dict(found.children), found.kind)
            case ast.List() | ast.Tuple():
                return Origins(place, {number: self._origins(one) for number, one in enumerate(node.elts)}, "list")
            case ast.BinOp(op=ast.Add()):
                left, right = self._origins(node.left), self._origins(node.right)
                if left.kind == right.kind == "list":
                    start = len(left.children)
                    children = left.children | {start + number: one for number, one in right.children.items()}
                    return Origins(place, children, "list")
            case ast.Name() if node.id in self._names:
                return replace(self._names[node.id], place=place, replaced=())
            case ast.Attribute() | ast.Subscript():
                key = node.attr if isinstance(node, ast.Attribute) else _constant(node.slice)
                if found_child := self._origins(node.value).children.get(key):
                    return replace(found_child, place=place, replaced=())
            case ast.Set(elts=[ast.Set(elts=[inner])]):  # {{_base_.x}}
                return self._origins(inner)
            case ast.Constant(value=str() as text) if text.startswith("{{") and BASE in text:
                return _base_value(text, self._names[BASE], place)
        return Origins(place)

    def _dict(self, place: Place, pairs: Sequence[tuple[ast.expr | None, ast.expr]]) -> Origins:
        children: dict[Any, Origins] = {}
        deletes = False
        for key, value in pairs:
            if key is None:
                children |= self._origins(value).children
            elif (name := _constant(key)) == _DELETE:
                deletes = isinstance(value, ast.Constant) and bool(value.value)
            else:
                children[name] = self._set_at(value, value)
        return Origins(place, children, "dict", deletes)


def _constant(node: ast.expr) -> Any:
    """Return a key that stands there as a constant; what is computed gets a key that nothing asks for."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        return ("-", node.operand.value)
    return node.value if isinstance(node, ast.Constant) else ("?", ast.unparse(node))


def _marked(path: Path, text: str, label: Callable[[Path], str]) -> Origins:
    """YAML and JSON, by the marks of the YAML parser; a JSON file that is no YAML has its file as the only place."""
    file = label(path)
    if path.suffix == ".json":
        text = text.replace("\t", " ")  # a JSON file may be indented by tabs, and has none in its texts
    try:
        # `{{_base_.x}}` stands there without quotes, which YAML takes for mappings.
        root = yaml.compose(_VARIABLE.sub(r'"{{\1}}"', text), yaml.SafeLoader)
    except yaml.YAMLError:
        return Origins(Place(file, 0), {}, "dict")
    bases = _bases([one.value for one in _scalars(root)], path, label)
    return merged(_of_node(root, file, bases), bases)


def _scalars(root: Any) -> Iterator[Any]:
    """The nodes of ``_base_``'s names."""
    for key, value in root.value if isinstance(root, yaml.MappingNode) else []:
        if key.value == BASE:
            yield from value.value if isinstance(value, yaml.SequenceNode) else [value]


def _of_node(node: Any, file: str, bases: Origins) -> Origins:
    place = Place(file, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        children: dict[Any, Origins] = {}
        deletes = False
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == BASE:
                continue
            if key.value == _DELETE:
                deletes = str(value.value).lower() == "true"
            else:
                set_at = Place(file, key.start_mark.line + 1)
                children[key.value] = replace(_of_node(value, file, bases), place=set_at)
        return Origins(place, children, "dict", deletes)
    if isinstance(node, yaml.SequenceNode):
        return Origins(place, {number: _of_node(one, file, bases) for number, one in enumerate(node.value)}, "list")
    return _base_value(node.value, bases, place) if node.value.startswith(f"{{{{{BASE}.") else Origins(place)


def _base_value(text: str, bases: Origins, place: Place) -> Origins:
    """Return the places of ``{{_base_.x.y}}``, set where it stands."""
    path = tuple(text.strip("{} ").split(".")[1:])
    return replace(bases.of(path), place=place, replaced=()) if bases.knows(path) else Origins(place)
