"""Values of the command line over those of a config, read and merged as MMEngine's ``--cfg-options`` does.

model.backbone.depth=101  "train_pipeline.0.type=X"  lr=0.1  scale=(1333,800)  names=[a,b]  names=a,b
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from detserve.mmdet_config import ConfigError

from dettools.configs.origins import Key, Origins, Place

_OPTION = Place("--cfg-options", 0)


@dataclass(frozen=True)
class Overridden:
    """A config with the command line's values.

    Attributes:
        values: the config's, with those of the command line.
        origins: where they are set.
        notes: keys that the config did not have: new ones, or mistyped.
    """

    values: dict[str, Any]
    origins: Origins
    notes: tuple[str, ...]


def overridden(values: Mapping[str, Any], origins: Origins, options: Sequence[str]) -> Overridden:
    """Set each ``KEY=VALUE``; dots lead into dicts, numbers into lists.

    Raises:
        ConfigError: an option is no ``KEY=VALUE``, or its key leads nowhere.
    """
    changed: dict[str, Any] = _copied(values)
    notes = []
    for option in options:
        dotted, equals, text = option.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"--cfg-options: got {option!r}, expected KEY=VALUE such as model.backbone.depth=101.")
        path, new = _set(changed, keys, option_value(text), dotted)
        if new:
            *above, key = path[:new]
            close = difflib.get_close_matches(str(key), _siblings(values, above), 1)
            meant = f"; did you mean {'.'.join(map(str, [*above, *close]))}?" if close else ""
            added = ".".join(map(str, path[:new]))
            notes.append(f"--cfg-options {dotted}: the config has no {added}, it is added{meant}")
        origins = _with_place(origins, path)
    return Overridden(changed, origins, tuple(notes))


def option_value(text: str) -> Any:
    """Read a value as MMEngine's ``DictAction``: numbers, booleans, None, lists, tuples, else text.

    A comma outside of brackets makes a list. Unlike there, blanks in a text stay.

    Raises:
        ConfigError: brackets do not match.
    """
    text = text.strip().strip("'\"").strip()
    if not text:
        return ""
    if text[:1] + text[-1:] in ("()", "[]") and _closes_at(text) == len(text) - 1:
        parts = [option_value(part) for part in _parts(text[1:-1])]
        return tuple(parts) if text[0] == "(" else parts
    parts = _parts(text)
    return [option_value(part) for part in parts] if parts != [text] else _scalar(text)


def _scalar(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    named = {"true": True, "false": False}
    if text.lower() in named:
        return named[text.lower()]
    return None if text == "None" else text


def _closes_at(text: str) -> int:
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if depth == 0:
            return place
    raise ConfigError(f"--cfg-options: got {text!r}, whose brackets do not match.")


def _parts(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    if depth:
        raise ConfigError(f"--cfg-options: got {text!r}, whose brackets do not match.")
    # As in Python, a comma at the end begins no further part.
    return [*parts, text[start:]] if text[start:].strip() else parts


def _set(values: dict[str, Any], keys: list[str], new: Any, dotted: str) -> tuple[tuple[Key, ...], int]:
    """Set a value; return its path, and how many of its keys lead to the first that was not there (0: none)."""
    place: Any = values
    path: list[Key] = []
    added = 0
    for depth, key in enumerate(keys):
        at: Key = int(key) if isinstance(place, list) and key.isdigit() else key
        if isinstance(place, list) and not (isinstance(at, int) and at < len(place)):
            raise ConfigError(f"--cfg-options {dotted}: got {key!r}, expected a number below {len(place)}.")
        if not isinstance(place, dict | list):
            raise ConfigError(
                f"--cfg-options {dotted}: {'.'.join(keys[:depth])} is a {type(place).__name__}, which has no {key!r}. "
                "Set it itself."
            )
        path.append(at)
        if isinstance(place, dict) and at not in place:
            added = added or depth + 1
            place[str(at)] = {}
        if depth == len(keys) - 1:
            place[at] = new  # type: ignore[index]
        else:
            # A tuple cannot be changed in its place.
            place[at] = list(place[at]) if isinstance(place[at], tuple) else place[at]  # type: ignore[index]
            place = place[at]  # type: ignore[index]
    return tuple(path), added


def _siblings(values: Any, path: Sequence[Key]) -> list[str]:
    for key in path:
        values = values[key]
    return [str(key) for key in values] if isinstance(values, Mapping) else []


def _with_place(origins: Origins, path: tuple[Key, ...]) -> Origins:
    if not path:
        return Origins(_OPTION, replaced=(origins.place, *origins.replaced))
    below = origins.children.get(path[0])
    if below is None:
        child = replace(_with_place(Origins(_OPTION, kind="dict"), path[1:]), replaced=())
    else:
        child = _with_place(below, path[1:])
    return replace(origins, children={**origins.children, path[0]: child})


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    return type(value)(_copied(inner) for inner in value) if isinstance(value, list | tuple) else value
