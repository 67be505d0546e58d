"""The anchors of an MMDetection or MMYOLO config, read without running it, and new ones written in its form.

    CONFIG.py ─► read_layout ─► AnchorLayout (sizes per level, strides) ─► grouped(new anchors) ─► config_text

The original prints a flat list, the smallest anchor first, while a config lists the levels in its own order, YOLOv3's
with the largest stride first: whoever copies the list gives the coarsest level the smallest anchors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detserve.mmdet_config import read_config

from dettools.analysis.anchor_boxes import AnchorError

Anchor = tuple[int, int]
Levels = tuple[tuple[tuple[float, float], ...], ...]

# MMDetection's name, and MMYOLO's.
_GENERATOR_KEYS = ("anchor_generator", "prior_generator")


@dataclass(frozen=True)
class AnchorLayout:
    """Where anchors belong.

    Attributes:
        base_sizes: of each level in the config's order, each with its anchors' width and height in pixels.
        strides: of each level.
        key: the config's name for the generator.
        current: whether ``base_sizes`` are in use, or only say how many anchors each level takes.
    """

    base_sizes: Levels
    strides: tuple[int, ...]
    key: str = _GENERATOR_KEYS[0]
    current: bool = True

    @property
    def anchors(self) -> tuple[tuple[float, float], ...]:
        """All anchors in one list."""
        return tuple(anchor for level in self.base_sizes for anchor in level)

    @property
    def count(self) -> int:
        """How many anchors there are."""
        return len(self.anchors)


def read_layout(config: Path, *, allow_code: bool = False) -> AnchorLayout:
    """Find the YOLOAnchorGenerator of a config.

    Raises:
        AnchorError: there is none, or it does not list sizes per level.
        ConfigError: the config cannot be read.
    """
    found = list(_generators(read_config(config, allow_code=allow_code).values.get("model")))
    lists = [(key, one) for key, one in found if one.get("base_sizes") is not None]
    if not lists:
        types = ", ".join(sorted({str(one.get("type")) for _, one in found})) or "no anchor generator"
        raise AnchorError(
            f"config {config.name}: got {types}, expected a YOLOAnchorGenerator, which lists the size of every anchor. "
            "For another generator give the annotations instead of the config: the sizes that come out lead to its "
            "scales and ratios."
        )
    key, generator = lists[0]
    levels, strides = generator["base_sizes"], generator.get("strides") or ()
    try:
        sizes = tuple(tuple((float(width), float(height)) for width, height in level) for level in levels)
        whole = tuple(int(stride[0] if isinstance(stride, list | tuple) else stride) for stride in strides)
    except (TypeError, ValueError, IndexError):
        sizes, whole = (), ()
    if not sizes or len(sizes) != len(whole) or not all(sizes):
        raise AnchorError(
            f"config {config.name}: got base_sizes {levels!r} with strides {strides!r}, expected one list of "
            "(width, height) for every stride"
        )
    return AnchorLayout(sizes, whole, key)


def layout_of(strides: Sequence[int], per_level: int, current: Sequence[tuple[float, float]] = ()) -> AnchorLayout:
    """Return the layout of a detector that has no config.

    Args:
        strides: of each level.
        per_level: anchors of each level.
        current: the anchors in use, in the order of the levels; none if there are none.

    Raises:
        AnchorError: the anchors in use are not as many as the levels take.
    """
    count = len(strides) * per_level
    if not strides or min(strides) < 1 or per_level < 1:
        raise AnchorError(f"got the strides {list(strides)} with {per_level} anchors each, expected at least 1 of each")
    if current and len(current) != count:
        raise AnchorError(
            f"got {len(current)} anchors in use, expected {count}: {per_level} for each of {len(strides)} levels. "
            "Give --strides and --per-level of your detector."
        )
    flat = list(current) or [(0.0, 0.0)] * count
    sizes = tuple(tuple(flat[place : place + per_level]) for place in range(0, count, per_level))
    return AnchorLayout(sizes, tuple(strides), current=bool(current))


def grouped(anchors: Sequence[Anchor], layout: AnchorLayout) -> tuple[tuple[Anchor, ...], ...]:
    """Give the smallest anchors to the finest level; the levels stand in the config's order.

    Raises:
        AnchorError: not as many anchors as the layout has.
    """
    if len(anchors) != layout.count:
        raise AnchorError(f"got {len(anchors)} anchors, expected {layout.count}, as the levels take")
    by_area = sorted(anchors, key=lambda anchor: (anchor[0] * anchor[1], anchor))
    levels: list[tuple[Anchor, ...]] = [()] * len(layout.strides)
    start = 0
    for level in sorted(range(len(layout.strides)), key=lambda one: layout.strides[one]):
        end = start + len(layout.base_sizes[level])
        levels[level] = tuple(by_area[start:end])
        start = end
    return tuple(levels)


def config_text(levels: Sequence[Sequence[Anchor]], layout: AnchorLayout) -> str:
    """Return the lines to put into a config."""
    rows = [f"[{', '.join(f'({width}, {height})' for width, height in level)}]" for level in levels]
    type_name = "YOLOAnchorGenerator" if layout.key == _GENERATOR_KEYS[0] else "mmdet.YOLOAnchorGenerator"
    inner = ",\n                ".join(rows)
    strides = ", ".join(map(str, layout.strides))
    return f"{layout.key}=dict(\n    type='{type_name}',\n    base_sizes=[{inner}],\n    strides=[{strides}])"


def _generators(value: Any) -> list[tuple[str, Mapping[str, Any]]]:
    found: list[tuple[str, Mapping[str, Any]]] = []
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key in _GENERATOR_KEYS and isinstance(inner, Mapping):
                found.append((str(key), inner))
            else:
                found += _generators(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            found += _generators(inner)
    return found
