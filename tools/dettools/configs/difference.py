"""What differs between two configs, key by key, with the places of both values.

Lists of different lengths are aligned first: a step put into a pipeline is one addition, not a change of all after it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from dettools.configs.config_source import LocatedConfig
from dettools.configs.config_text import flat_text
from dettools.configs.origins import Key, Origins, Place


@dataclass(frozen=True)
class Change:
    """One key that differs.

    Attributes:
        kind: ``added`` (only the second has it), ``removed`` (only the first) or ``changed``.
        path: in the first config; of an addition, in the second.
        before: the first's value.
        after: the second's value.
        before_place: where the first sets it; None for an addition.
        after_place: where the second sets it; None for a removal.
    """

    kind: str
    path: tuple[Key, ...]
    before: Any
    after: Any
    before_place: Place | None
    after_place: Place | None

    @property
    def key(self) -> str:
        """The dotted key."""
        return ".".join(map(str, self.path))


def differences(before: LocatedConfig, after: LocatedConfig) -> list[Change]:
    """Compare two configs; a list and a tuple of the same elements differ, as MMDetection tells them apart."""
    return list(_compared(before.values, after.values, (), (), before.origins, after.origins))


def _compared(
    before: Any, after: Any, old: tuple[Key, ...], new: tuple[Key, ...], left: Origins, right: Origins
) -> Iterator[Change]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys(), key=str):
            if key not in after:
                yield _removed(before[key], (*old, key), left)
            elif key not in before:
                yield _added(after[key], (*new, key), right)
            else:
                yield from _compared(before[key], after[key], (*old, key), (*new, key), left, right)
    elif type(before) is type(after) and isinstance(before, list | tuple) and _nested(before) and _nested(after):
        yield from _aligned(before, after, old, new, left, right)
    elif type(before) is not type(after) or flat_text(before) != flat_text(after):
        yield Change("changed", old, before, after, left.of(old).place, right.of(new).place)


def _aligned(
    before: Any, after: Any, old: tuple[Key, ...], new: tuple[Key, ...], left: Origins, right: Origins
) -> Iterator[Change]:
    matcher = SequenceMatcher(None, [flat_text(one) for one in before], [flat_text(one) for one in after], False)
    for word, start, end, first, last in matcher.get_opcodes():
        if word == "equal":
            continue
        both = min(end - start, last - first)
        for step in range(both):
            at, to = start + step, first + step
            yield from _compared(before[at], after[to], (*old, at), (*new, to), left, right)
        for at in range(start + both, end):
            yield _removed(before[at], (*old, at), left)
        for to in range(first + both, last):
            yield _added(after[to], (*new, to), right)


def _nested(value: Any) -> bool:
    return any(isinstance(one, dict | list | tuple) for one in value)


def _removed(value: Any, path: tuple[Key, ...], origins: Origins) -> Change:
    return Change("removed", path, value, None, origins.of(path).place, None)


def _added(value: Any, path: tuple[Key, ...], origins: Origins) -> Change:
    return Change("added", path, None, value, None, origins.of(path).place)
