"""MMDetection configs as data: read without running them where they are literal, run only when that is allowed.

A config is a Python file that MMEngine executes. Nearly all of them only assign: such a file is parsed, its right-hand
sides are evaluated here (by `config_evaluation`) and its
`_base_` files are merged underneath, as `mmengine.Config.fromfile` does. What needs more than that is run by MMEngine
in a process of its own, and only when the caller says so.

    path ─► parse ─► evaluate ─► bases, merged underneath ─► values
               └─ more than assignments ─► allow_code? ─► Config.fromfile in a process ─┘

Values without code are not harmless yet: MMEngine looks `type` up as a Python path and calls what it finds. What may be
built from them is decided where it is built (`dethandlers.mmdet_types`).
"""

import ast
import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from detserve.config_evaluation import Budget, Evaluation
from detserve.config_evaluation import ConfigError as ConfigError
from detserve.config_evaluation import NotLiteralError as NotLiteralError

_BASE, _DELETE = "_base_", "_delete_"
_DEEPEST = 40
_MOST_FILES = 1000
_BASE_VARIABLE = re.compile(r"\{\{\s*_base_\.([\w.]+)\s*\}\}")
_ENVIRONMENT = re.compile(r"\{\{\s*\$")
_RUNNER = """
import sys
from detserve.mmdet_config import dump_config
from mmengine.config import Config
values = Config.fromfile(sys.argv[1], import_custom_modules=False).to_dict()
with open(sys.argv[2], "w", encoding="utf-8") as file:
    file.write(dump_config(values))
"""


@dataclass(frozen=True)
class MmdetConfig:
    """A flattened config.

    Attributes:
        values: dicts, lists, tuples, strings, numbers, booleans and None, nothing else.
        files: what was read, bases first; the config alone when it was run.
        code_ran: why the config had to be run; empty when nothing was.
    """

    values: dict[str, Any]
    files: tuple[Path, ...]
    code_ran: str


def read_config(path: Path, *, allow_code: bool = False) -> MmdetConfig:
    """Read a config with its bases.

    Args:
        path: ``.py``, ``.json``, ``.yaml`` or ``.yml``; or what `dump_config` wrote, as an archive has it.
        allow_code: a config that is not literal is executed, with all rights of this process.

    Raises:
        NotLiteralError: the config would have to be run, and that is not allowed.
        ConfigError: no such file, damaged, or not to be flattened.
    """
    files: list[Path] = []
    try:
        if path.suffix == ".py" and _is_one_dict(text := _text_of(path)):
            return MmdetConfig(load_config(text), (path.resolve(),), "")
        return MmdetConfig(_flattened(path.resolve(), files, 0), tuple(files), "")
    except NotLiteralError as error:
        if not allow_code:
            raise NotLiteralError(
                f"{error} Reading it would run it. If you trust whoever wrote it, allow that with --allow-code; else "
                "give the flattened config that MMDetection's training wrote into its work folder."
            ) from error
        return MmdetConfig(_run(path), (path.resolve(),), str(error))


def dump_config(values: Mapping[str, Any]) -> str:
    """Write values as a Python literal: JSON would turn tuples into lists, which MMDetection tells apart.

    Raises:
        ConfigError: something in them is no data.
    """
    _require_data(values, "")
    lines = [f"    {key!r}: {_literal(values[key])},\n" for key in values]
    return "{\n" + "".join(lines) + "}\n"


def load_config(text: str) -> dict[str, Any]:
    """Read what `dump_config` wrote; nothing is executed.

    Raises:
        ConfigError: it is no literal dict.
    """
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ConfigError(f"config: got what is no Python literal ({error}); expected a flattened config.") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"config: got a {type(values).__name__}, expected a dict of the config's values.")
    return values


def _flattened(path: Path, files: list[Path], depth: int) -> dict[str, Any]:
    if depth > _DEEPEST or len(files) > _MOST_FILES:
        raise ConfigError(
            f"config {path.name}: its _base_ files form a circle, or there are more than {_DEEPEST} on each other or "
            f"{_MOST_FILES} in all. Take out the one that leads back."
        )
    values, bases = _evaluated(path, files, depth)
    files.append(path)
    merged = _merged(values, bases)
    return {key: value for key, value in merged.items() if not key.startswith("__")}


def _evaluated(path: Path, files: list[Path], depth: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a file's own values and its bases'."""
    if path.suffix not in (".py", ".json", ".yaml", ".yml"):
        raise ConfigError(f"config: got {path.name}, expected a .py, .json or .yaml file.")
    text = _text_of(path)
    if _ENVIRONMENT.search(text):
        raise NotLiteralError(f"config {path.name} asks for variables of the environment.")
    text, asked = _without_variables(text, path)
    try:
        if path.suffix == ".py":
            tree = ast.parse(text)
            named = _base_names_of(tree, path)
        else:
            own: Any = json.loads(text) if path.suffix == ".json" else yaml.load(text, _Yaml)  # noqa: S506 - a SafeLoader
            if not isinstance(own, dict) or not all(isinstance(key, str) for key in own):
                got = f"the keys {', '.join(map(repr, own))}" if isinstance(own, dict) else f"a {type(own).__name__}"
                raise ConfigError(f"config {path.name}: got {got}, expected a mapping of names to values.")
            named = own.pop(_BASE, [])
    except (SyntaxError, ValueError, yaml.YAMLError, RecursionError, MemoryError) as error:
        raise ConfigError(f"config {path.name}: cannot be parsed ({error}).") from error
    bases: dict[str, Any] = {}
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"config {path.name}: got _base_ = {named!r}, expected a file's name or a list of them.")
    for name in names:
        if "::" in name:
            raise NotLiteralError(f"config {path.name} is based on {name}, a config of another package.")
        base = _flattened((path.parent / name).resolve(), files, depth + 1)
        doubled = base.keys() & bases.keys()
        if doubled:
            raise ConfigError(f"config {path.name}: two of its bases set {', '.join(sorted(doubled))}.")
        bases |= base
    values = Evaluation(path, bases).run(tree) if path.suffix == ".py" else own
    budget = Budget(path)
    budget.count(values)
    if path.suffix != ".py":
        _require_known(values, path)
    return _substituted(values, asked, bases, budget), bases


def _without_variables(text: str, path: Path) -> tuple[str, dict[str, str]]:
    """Replace ``{{ fileDirname }}`` and its like by their values, ``{{_base_.x}}`` by strings that stand for them."""
    known = {
        "fileDirname": str(path.parent),
        "fileBasename": path.name,
        "fileBasenameNoExtension": path.stem,
        "fileExtname": path.suffix,
    }
    for name, value in known.items():
        text = re.sub(r"\{\{\s*" + name + r"\s*\}\}", value.replace("\\", "/"), text)
    asked: dict[str, str] = {}

    def mark(match: re.Match[str]) -> str:
        asked[f"<{_BASE} {match.group(1)}>"] = match.group(1)
        return f'"<{_BASE} {match.group(1)}>"'

    return _BASE_VARIABLE.sub(mark, text), asked


def _substituted(value: Any, asked: Mapping[str, str], bases: Mapping[str, Any], budget: Budget) -> Any:
    """Copy without sharing, values of the bases in place of what stands for them."""
    if isinstance(value, str) and value in asked:
        found: Any = bases
        for part in asked[value].split("."):
            if not isinstance(found, Mapping) or part not in found:
                raise ConfigError(f"config {budget.path.name}: its bases have no {asked[value]}.")
            found = found[part]
        budget.count(found)
        return _substituted(found, {}, bases, budget)
    if isinstance(value, Mapping):
        return {key: _substituted(inner, asked, bases, budget) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_substituted(inner, asked, bases, budget) for inner in value)
    return value


def _merged(over: dict[str, Any], under: dict[str, Any]) -> dict[str, Any]:
    """Merge as MMEngine: dicts join, everything else replaces, and so does a dict that says ``_delete_``."""
    merged = dict(under)
    for key, value in over.items():
        if isinstance(value, dict) and key in merged and not value.pop(_DELETE, False):
            if not isinstance(merged[key], dict):
                raise ConfigError(
                    f"config: {key} is a dict and its base's is a {type(merged[key]).__name__}. Say _delete_=True."
                )
            merged[key] = _merged(value, merged[key])
        else:
            merged[key] = value
    return merged


def _text_of(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"config: cannot read {path} ({error}). Give the config with its _base_ files.") from error


def _is_one_dict(text: str) -> bool:
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False  # told where it is evaluated
    return len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Dict)


class _Yaml(yaml.SafeLoader):
    """Without merge keys (``<<``): a few lines of them, each merging the one before often, fill the memory."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse one."""
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.YAMLError("merge keys (<<) are not read")


def _base_names_of(tree: ast.Module, path: Path) -> Any:
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == _BASE:
            return Evaluation(path, {}).value(statement.value)
    return []


def _run(path: Path) -> dict[str, Any]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "values"
        try:
            done = subprocess.run(
                [sys.executable, "-c", _RUNNER, str(path.resolve()), str(result)],
                check=False,
                capture_output=True,
                text=True,
                timeout=300,
            )
        except subprocess.TimeoutExpired as error:
            raise ConfigError(f"config {path.name}: running it took more than 300 s.") from error
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ConfigError(f"config {path.name}: running it failed ({last[:300]}).")
        if not result.exists():
            raise ConfigError(f"config {path.name}: running it ended before its values were known. Does it call exit?")
        return load_config(result.read_text("utf-8"))


def _require_known(value: Any, path: Path) -> None:
    """Refuse YAML's dates and bytes: no Python config has them."""
    if isinstance(value, dict | list | tuple | set):
        for inner in [*value, *value.values()] if isinstance(value, dict) else value:
            _require_known(inner, path)
    elif not isinstance(value, str | int | float | bool | None):
        raise ConfigError(
            f"config {path.name}: got {value!r}, a {type(value).__name__}, expected texts and numbers. Put a date in "
            "quotes."
        )


def _require_data(value: Any, place: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str | int | float | bool | None):
                raise ConfigError(f"config: {place}: got a key of type {type(key).__name__}, expected data.")
            _require_data(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple | set):
        for number, inner in enumerate(value):
            _require_data(inner, f"{place}[{number}]")
    elif isinstance(value, float) and math.isnan(value):
        raise ConfigError(f"config: {place}: got nan, for which Python has no literal. Write another number, or None.")
    elif not isinstance(value, str | int | float | bool | None):
        raise ConfigError(f"config: {place}: got a {type(value).__name__}, expected data.")


def _literal(value: Any) -> str:
    match value:
        case float() if math.isinf(value):
            return "1e999" if value > 0 else "-1e999"  # repr() writes a name; a number too large is a literal
        case dict():
            return f"{{{', '.join(f'{_literal(key)}: {_literal(inner)}' for key, inner in value.items())}}}"
        case list():
            return f"[{', '.join(map(_literal, value))}]"
        case tuple():
            return f"({', '.join(map(_literal, value))}{',' if len(value) == 1 else ''})"
        case set() if value:
            return f"{{{', '.join(map(_literal, value))}}}"
        case _:
            return repr(value)
