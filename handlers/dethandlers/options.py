"""The options of one request: what a client may ask for, with the spec's values as defaults.

An unknown option or a malformed value is an OptionError that names it and what is allowed.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from dethandlers.detections import Category
from dethandlers.errors import OptionError
from dethandlers.spec import Serving

MAX_DETECTIONS_LIMIT = 1000


@dataclass(frozen=True)
class Options:
    """What one request asks for.

    Attributes:
        score_threshold: detections with ``score >= score_threshold`` are answered.
        max_detections: at most this many, the best first.
        labels: only these 0-based labels, or None for all.
        format: ``list`` (the published MMDetection form), ``coco`` (results form) or ``columns``.
        masks: answer each detection's mask as COCO RLE.
        keypoints: answer each detection's keypoints.
        category_id: add the COCO category id to each detection.
        timings: wrap the answer and add the stage times.
    """

    score_threshold: float
    max_detections: int
    labels: frozenset[int] | None = None
    format: Literal["list", "coco", "columns"] = "list"
    masks: bool = False
    keypoints: bool = False
    category_id: bool = False
    timings: bool = False


def parse_options(
    values: Mapping[str, Any], serving: Serving, categories: tuple[Category, ...], capabilities: frozenset[str]
) -> Options:
    """Read a request's options.

    Args:
        values: option name to value, as text, bytes or JSON value.
        serving: the spec's defaults and its floor.
        categories: the category map, for ``classes``.
        capabilities: of ``masks`` and ``keypoints``, what the model has.

    Raises:
        OptionError: an unknown option, a malformed value, or something that the model does not have.
    """
    parsed: dict[str, Any] = {
        "score_threshold": serving.score_threshold,
        "max_detections": serving.max_detections,
    }
    for name, raw in values.items():
        if name not in _PARSERS:
            close = difflib.get_close_matches(name[:80], _PARSERS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise OptionError(
                f"unknown option {name[:80]!r}{hint} Allowed: {', '.join(sorted(_PARSERS))}.", type="unknown_option"
            )
        value = raw.decode("utf-8", "replace") if isinstance(raw, bytes | bytearray) else raw
        if name == "classes":
            parsed["labels"] = _labels(value, categories)
        else:
            parsed[name] = _PARSERS[name](name, value)
    for name in ("masks", "keypoints"):
        if parsed.get(name) and name not in capabilities:
            raise OptionError(f"{name} were asked for, but this model has none. Leave the option {name!r} out.")
    parsed["score_threshold"] = max(parsed["score_threshold"], serving.min_score_threshold)
    return Options(**parsed)


def _threshold(name: str, value: Any) -> float:
    number = _number(name, value, "a number from 0 to 1")
    if not 0.0 <= number <= 1.0:
        raise _malformed(name, value, "a number from 0 to 1")
    return number


def _count(name: str, value: Any) -> int:
    expected = f"a whole number from 1 to {MAX_DETECTIONS_LIMIT}"
    number = _number(name, value, expected)
    if number != int(number) or not 1 <= number <= MAX_DETECTIONS_LIMIT:
        raise _malformed(name, value, expected)
    return int(number)


def _number(name: str, value: Any, expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _malformed(name, value, expected)
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise _malformed(name, value, expected) from None
    if not math.isfinite(number):
        raise _malformed(name, value, expected)
    return number


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if not isinstance(value, str) or value.lower() not in words:
        raise _malformed(name, value, "true or false")
    return words[value.lower()]


def _masks(name: str, value: Any) -> bool:
    if value not in ("rle", "none"):
        raise _malformed(name, value, "rle or none")
    return cast("str", value) == "rle"


def _format(name: str, value: Any) -> str:
    if value not in ("list", "coco", "columns"):
        raise _malformed(name, value, "list, coco or columns")
    return cast("str", value)


def _labels(value: Any, categories: tuple[Category, ...]) -> frozenset[int]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _malformed("classes", value, "class names separated by commas")
    label_of = {category.name: label for label, category in enumerate(categories)}
    wanted = {name.strip() for name in names}
    unknown = sorted(wanted - label_of.keys())
    if unknown:
        close = difflib.get_close_matches(unknown[0][:80], label_of, n=3)
        known = ", ".join(close or list(label_of)[:20])
        raise OptionError(
            f"classes: got {unknown[0][:80]!r}, which this model does not know; expected names such as {known}. "
            "Send the names of the model's category map."
        )
    return frozenset(label_of[name] for name in wanted)


def _malformed(name: str, value: Any, expected: str) -> OptionError:
    return OptionError(f"{name}: got {str(value)[:80]!r}, expected {expected}. Send ?{name}=… with such a value.")


_PARSERS: dict[str, Callable[[str, Any], Any]] = {
    "score_threshold": _threshold,
    "max_detections": _count,
    "classes": lambda _name, value: value,
    "format": _format,
    "masks": _masks,
    "keypoints": _flag,
    "category_id": _flag,
    "timings": _flag,
}
OPTION_NAMES = frozenset(_PARSERS)
