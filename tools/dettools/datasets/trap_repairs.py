"""Undoes the metric traps of a COCO file one by one, so that the cost of each can be measured; nothing is written."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from dettools.datasets.dataset import Box, Dataset, box_of, is_id, is_key, is_number, read_header, size_of

# An annotation's place stays its place; what was taken out is None.
Entries = list[dict[str, Any] | None]
# A point in fractions of the stored width and height, in those of the photograph as EXIF's orientation shows it.
_TURNED: dict[int, Callable[[float, float], tuple[float, float]]] = {
    1: lambda x, y: (x, y),
    2: lambda x, y: (1 - x, y),
    3: lambda x, y: (1 - x, 1 - y),
    4: lambda x, y: (x, 1 - y),
    5: lambda x, y: (y, x),
    6: lambda x, y: (1 - y, x),
    7: lambda x, y: (1 - y, 1 - x),
    8: lambda x, y: (y, 1 - x),
}


def fractions_as_boxes(boxes: Sequence[Box]) -> Callable[[Box], Box]:
    """Return what turns fractions into x, y, width, height: they may be that, two corners, or a centre and sizes."""
    if all(box[0] + box[2] <= 1.001 and box[1] + box[3] <= 1.001 for box in boxes):
        return lambda box: box
    if all(box[0] < box[2] and box[1] < box[3] for box in boxes):
        return from_corners
    return lambda box: (box[0] - box[2] / 2, box[1] - box[3] / 2, box[2], box[3])


def with_new_ids(places: frozenset[int], entries: Entries) -> Entries:
    """Give new ids to the entries at some places."""
    new = itertools.count(1 + max((one["id"] for one in entries if one and is_id(one.get("id"))), default=0))
    return [{**one, "id": next(new)} if one and place in places else one for place, one in enumerate(entries)]


def without(places: frozenset[int], entries: Entries) -> Entries:
    """Take out the entries at some places."""
    return [None if place in places else one for place, one in enumerate(entries)]


def with_ids_of_places(ids: Mapping[int, int], entries: Entries) -> Entries:
    """Write the id where a class's place in the list stands."""
    return [one and {**one, "category_id": ids.get(one["category_id"], one["category_id"])} for one in entries]


def from_corners(box: Box) -> Box:
    """Return x, y, width, height of two corners."""
    return box[0], box[1], max(box[2] - box[0], 0.0), max(box[3] - box[1], 0.0)


def with_changed_boxes(places: frozenset[int], change: Callable[[Box], Box], entries: Entries) -> Entries:
    """Change the boxes at some places."""
    return [_changed(one, change) if one and place in places else one for place, one in enumerate(entries)]


def in_pixels(dataset: Dataset, places: frozenset[int], change: Callable[[Box], Box], entries: Entries) -> Entries:
    """Change the boxes at some places, then multiply them with the sides of their images."""

    def scaled(size: tuple[int, int], box: Box) -> Box:
        x, y, width, height = change(box)
        return x * size[0], y * size[1], width * size[0], height * size[1]

    changed: Entries = []
    for place, one in enumerate(entries):
        image = _image_of(dataset, one) if place in places else None
        size = None if image is None else size_of(dataset.images[image])
        changed.append(_changed(one, partial(scaled, size)) if one and size else one)
    return changed


def turned_as_shown(dataset: Dataset, places: frozenset[int], entries: Entries) -> Entries:
    """Turn boxes of a photograph as stored into boxes of it as shown."""
    changed: Entries = []
    for place, one in enumerate(entries):
        image = _image_of(dataset, one) if place in places else None
        file = dataset.files[image] if image is not None else None
        if one is None or file is None:
            changed.append(one)
            continue
        header = read_header(file)

        def turned(box: Box, header: Any = header) -> Box:
            stored, shown = header.stored, header.shown
            corners = [(box[0], box[1]), (box[0] + box[2], box[1] + box[3])]
            points = [_TURNED[header.orientation](x / stored[0], y / stored[1]) for x, y in corners]
            xs, ys = [x * shown[0] for x, _ in points], [y * shown[1] for _, y in points]
            return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)

        changed.append(_changed(one, turned))
    return changed


def _image_of(dataset: Dataset, entry: dict[str, Any] | None) -> int | None:
    identifier = entry.get("image_id") if entry else None
    return dataset.image_places.get(identifier) if is_key(identifier) else None


def _changed(entry: dict[str, Any], change: Callable[[Box], Box]) -> dict[str, Any]:
    """Change the box of an entry, and its area if it was the box's."""
    box = box_of(entry)
    if box is None:
        return entry
    now = change(box)
    area = entry.get("area")
    own = is_number(area) and abs(area - box[2] * box[3]) <= 1e-3 * abs(area)
    return {**entry, "bbox": list(now), **({"area": now[2] * now[3]} if own else {})}
