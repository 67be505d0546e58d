"""A config written down: in Python as configs are written and read back to the same values, in JSON, or in YAML."""

import contextlib
import json
import keyword
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from detserve.mmdet_config import ConfigError

FORMATS = (".py", ".json", ".yml", ".yaml")
_WIDTH = 88


def pretty_text(values: Mapping[str, Any]) -> str:
    """Write assignments sorted by key; a config with keys that are no Python names is written as one dict."""
    if not all(_is_name(key) for key in values):
        return "\n".join(_lines(dict(values), 0, "", "")) + "\n"
    return "".join("\n".join(_lines(values[key], 0, f"{key} = ", "")) + "\n" for key in sorted(values))


def flat_text(value: Any) -> str:
    """Write one value on one line."""
    match value:
        case float() if math.isinf(value) or math.isnan(value):
            return f"float('{value}')"
        case dict() if all(_is_name(key) for key in value):
            return f"dict({', '.join(f'{key}={flat_text(value[key])}' for key in _sorted(value))})"
        case dict():
            return f"{{{', '.join(f'{key!r}: {flat_text(value[key])}' for key in _sorted(value))}}}"
        case list():
            return f"[{', '.join(map(flat_text, value))}]"
        case tuple():
            return f"({', '.join(map(flat_text, value))}{',' if len(value) == 1 else ''})"
        case set():
            return f"{{{', '.join(sorted(map(flat_text, value)))}}}"
        case _:
            return repr(value)


def save_config(path: Path, values: Mapping[str, Any]) -> list[str]:
    """Write a config in the format of the file's name; its folder is made where it is missing.

    Returns:
        Notes: what the format cannot hold.

    Raises:
        ConfigError: the name has another ending, or the file cannot be written.
    """
    if path.suffix not in FORMATS:
        raise ConfigError(f"--save-path: got {path}, expected a name that ends in {', '.join(FORMATS)}.")
    notes = []
    if path.suffix != ".py" and (tuples := _tuples_in(values)):
        notes.append(
            f"{path.suffix} has no tuples: {tuples} became lists, which some types tell apart. A .py keeps them."
        )
    if path.suffix == ".py":
        text = pretty_text(values)
    elif path.suffix == ".json":
        text = json.dumps(plain(values), indent=2) + "\n"
    else:
        text = yaml.safe_dump(plain(values), sort_keys=False, allow_unicode=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"--save-path {path}: cannot be written ({reason}). Choose another place.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return notes


def _lines(value: Any, indent: int, before: str, after: str) -> list[str]:
    """Write a value on one line where it fits, else one line for each of its parts."""
    margin = " " * indent
    flat = f"{margin}{before}{flat_text(value)}{after}"
    if len(flat) <= _WIDTH or not isinstance(value, dict | list | tuple) or not value:
        return [flat]
    if isinstance(value, dict):
        named = all(_is_name(key) for key in value)
        opening, closing = ("dict(", ")") if named else ("{", "}")
        parts = [(f"{key}=" if named else f"{key!r}: ", value[key]) for key in _sorted(value)]
    else:
        opening, closing = "[]" if isinstance(value, list) else "()"
        parts = [("", one) for one in value]
    lines = [f"{margin}{before}{opening}"]
    for name, inner in parts:
        lines += _lines(inner, indent + 4, name, ",")
    return [*lines, f"{margin}{closing}{after}"]


def _sorted(value: Mapping[Any, Any]) -> list[Any]:
    return sorted(value, key=str)


def _is_name(key: Any) -> bool:
    return isinstance(key, str) and key.isidentifier() and not keyword.iskeyword(key)


def _tuples_in(value: Any) -> int:
    if isinstance(value, Mapping):
        return sum(_tuples_in(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return isinstance(value, tuple) + sum(_tuples_in(inner) for inner in value)
    return 0


def plain(value: Any, *, finite: bool = False) -> Any:
    """Return a value as JSON and YAML can hold it: what is counted through becomes a list.

    Args:
        value: of a config.
        finite: infinite numbers and NaN become texts, which every reader of JSON knows.
    """
    if isinstance(value, Mapping):
        keys = {key: key if isinstance(key, str | int | float | None) else str(key) for key in _sorted(value)}
        return {shown: plain(value[key], finite=finite) for key, shown in keys.items()}
    if isinstance(value, set):
        value = sorted(value, key=str)
    if isinstance(value, list | tuple | range):
        return [plain(inner, finite=finite) for inner in value]
    return str(value) if finite and isinstance(value, float) and not math.isfinite(value) else value
