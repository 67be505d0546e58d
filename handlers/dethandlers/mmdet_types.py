"""Which names a config of MMDetection may have its classes looked up by.

MMEngine takes any importable name for a ``type`` and calls it: a config with ``type: os.system`` would run. Allowed are
names of the registries, and in full the classes of the frameworks themselves.
"""

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_NAME = re.compile(r"(?:(\w+)\.)?[A-Za-z_]\w*")
# Frameworks whose own classes a config may name in full, as MMEngine's newer configs do once they are flattened.
_FRAMEWORKS = {"mmdet", "mmcv", "mmengine", "mmpretrain", "torch"}
# Packages of registries.
_SCOPES = {"mmdet", "mmcv", "mmengine", "mmpretrain", "mmcls"}


def foreign_type(values: Mapping[str, Any], scopes: Sequence[str] = ()) -> str:
    """Return the first ``type`` that MMEngine would look up outside of its registries, as a sentence; empty without.

    Args:
        values: of the part that will be built (model, test pipeline, data set).
        scopes: packages beside MMDetection's whose registries may be named, as in ``scope.Name``.
    """
    for place, kind in _types(values, ""):
        if isinstance(kind, str):
            name = _NAME.fullmatch(kind)
            if name and name.group(1) in {None, *_SCOPES, *scopes}:
                continue
            if "." in kind and _is_class_of_a_framework(kind):
                continue
        return (
            f"{place}: got type {kind!r}, which MMEngine would call as code; expected the name of a registered class."
        )
    return ""


def _types(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            at = f"{place}.{key}" if place else str(key)
            if key == "type":
                yield at, inner
            else:
                yield from _types(inner, at)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _types(inner, f"{place}[{number}]")


def _is_class_of_a_framework(name: str) -> bool:
    """Whether a dotted name is a class where it says, and not some other module's that is reachable from there."""
    *modules, last = name.split(".")
    if modules[0] not in _FRAMEWORKS or not all(part.isidentifier() for part in (*modules, last)):
        return False
    try:
        found = getattr(importlib.import_module(".".join(modules)), last)
    except (ImportError, AttributeError):
        return False
    return isinstance(found, type) and found.__module__.partition(".")[0] == modules[0]
