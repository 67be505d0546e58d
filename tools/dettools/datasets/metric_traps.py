"""What falsifies the COCO metrics of an annotation file without any error message, and what each such trap costs.

    annotations ─► find_traps ─► AP as the files are · AP with all traps undone but one · AP with all undone

The cost of a trap is what it takes from AP in files that are sound but for it. AP as the files are is what pycocotools
has: it leaves out what is of an unknown image or class, and counts the object with the id 0 as never found.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from dettools.coco_metrics import evaluate_coco
from dettools.datasets.dataset import Box, Dataset, Problem, box_of, is_id, is_key, is_number, read_header, size_of
from dettools.datasets.inspection import Inspection, find_problems
from dettools.ground_truth import GroundTruth, ground_truth_of
from dettools.predictions import RESULTS_FILE, load_predictions

TRAPS = {
    "id_zero": "an annotation has the id 0: pycocotools counts its object as never found",
    "category_index": "places in the list of classes are written where category ids belong",
    "xyxy_as_xywh": "two corners are written where x, y, width, height belong",
    "normalised_boxes": "boxes are fractions of the image and not pixels",
    "exif_swapped": "boxes are of the photograph as stored, which EXIF turns",
    "duplicate_box": "an object is there twice: the second can never be found",
    "zero_area": "a box without width or height, or with a negative one, can never be found",
}
Where = Literal["annotations", "predictions"]
# An annotation's place stays its place; what was taken out is None.
Entries = list[dict[str, Any] | None]
_MOST_EXAMPLES = 3
_SHARE = 0.95
# No detection reaches so far.
_FAR_AWAY = 1e7
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


@dataclass(frozen=True)
class Trap:
    """A trap in a file.

    Attributes:
        kind: a key of `TRAPS`.
        where: in which file.
        count: how many entries fell into it.
        examples: some of them in words.
        ap: AP over IoU .50:.95 once all others are undone; None without predictions.
        cost: the AP with all of them undone, less that; None without predictions.
    """

    kind: str
    where: Where
    count: int
    examples: tuple[str, ...]
    ap: float | None = None
    cost: float | None = None


@dataclass(frozen=True)
class TrapCheck:
    """The traps of two files, with the AP as they are and with all traps undone; None without predictions."""

    traps: tuple[Trap, ...]
    ap: float | None = None
    ap_undone: float | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        traps = [{**vars(one), "meaning": TRAPS[one.kind]} for one in self.traps]
        return {"traps": traps, "ap": self.ap, "ap_undone": self.ap_undone, "notes": list(self.notes)}


@dataclass(frozen=True)
class _Found:
    kind: str
    where: Where
    count: int
    examples: tuple[str, ...]
    undo: Callable[[Entries], Entries] = field(repr=False)


def find_traps(dataset: Dataset, predictions: Path | None = None) -> TrapCheck:
    """Look for the traps of a COCO file and of predictions, and measure what each costs.

    Args:
        dataset: read by `dettools.datasets.coco.read_coco`.
        predictions: what `load_predictions` takes.

    Raises:
        GroundTruthError: two images or two classes have one id, so that there is no AP.
        PredictionsError: as `load_predictions`.
    """
    found = _in_annotations(dataset)
    if predictions is None:
        return TrapCheck(tuple(Trap(one.kind, one.where, one.count, one.examples) for one in found))
    annotations: Entries = [dict(one) for one in dataset.annotations]
    truth = _truth(dataset, annotations)
    # Where they are COCO results, which may have traps of their own; pickles hold labels and corners by definition.
    raw = _raw_results(predictions)
    notes: tuple[str, ...] = ()
    if raw is None:
        loaded = load_predictions(predictions, truth)
        results: Entries = [*loaded.results]
        notes = loaded.notes
    else:
        results = [*raw]
        found += _in_results(dataset, raw)

    def ap(undone: Sequence[_Found]) -> float:
        sides: dict[Where, Entries] = {"annotations": annotations, "predictions": results}
        for one in undone:
            sides[one.where] = one.undo(sides[one.where])
        against = _truth(dataset, sides["annotations"])
        detections = [one for one in sides["predictions"] if one is not None]
        if raw is not None:
            detections = _checked(detections, against, predictions)
        return evaluate_coco(against, detections).ap

    sound = ap(found)
    traps = []
    for one in found:
        left = ap([other for other in found if other is not one])
        traps.append(Trap(one.kind, one.where, one.count, one.examples, left, sound - left))
    return TrapCheck(tuple(traps), ap([]), sound, notes)


def _in_annotations(dataset: Dataset) -> list[_Found]:
    """Return the traps in the order in which they are undone together."""
    inspection = find_problems(dataset)
    by_kind = _by_kind(inspection)
    boxes = _wrong_boxes(dataset, dataset.annotations, "annotations", by_kind, inspection.notes)
    found = [*boxes]
    if (index := _category_index(dataset, dataset.annotations, "annotations")) is not None:
        found.append(index)
    turned = {problem.image: problem for problem in by_kind.get("exif_swapped", [])}
    if turned and (
        there := [one for image in turned if image is not None for one in dataset.annotations_of.get(image, [])]
    ):
        examples = tuple(
            f"{dataset.name_of(image)}: {problem.detail}" for image, problem in turned.items() if image is not None
        )
        undo = partial(_turn, dataset, frozenset(there))
        found.append(_Found("exif_swapped", "annotations", len(there), examples[:_MOST_EXAMPLES], undo))
    if "id_zero" in by_kind:
        found.append(_of_problems("id_zero", by_kind, _renumber))
    if boxes:
        # Fractions all look alike, and corners have sizes of their own.
        changed: Entries = [dict(one) for one in dataset.annotations]
        for one in boxes:
            changed = one.undo(changed)
        sound = replace(dataset, document={**dataset.document, "annotations": changed}, problems=())
        by_kind = _by_kind(find_problems(sound, open_files=False))
    dropped = [kind for kind in ("duplicate_box", "zero_area") if kind in by_kind]
    return [*found, *(_of_problems(kind, by_kind, partial(_drop, _places(by_kind[kind]))) for kind in dropped)]


def _by_kind(inspection: Inspection) -> dict[str, list[Problem]]:
    by_kind: dict[str, list[Problem]] = {}
    for problem in inspection.problems:
        by_kind.setdefault("zero_area" if problem.kind == "negative_size" else problem.kind, []).append(problem)
    return by_kind


def _in_results(dataset: Dataset, results: Sequence[dict[str, Any]]) -> list[_Found]:
    """Return the traps of COCO results, which are annotations with scores."""
    document = {**dataset.document, "annotations": results}
    as_dataset = Dataset("coco", dataset.path, document, dataset.files, files_known=False)
    inspection = find_problems(as_dataset, open_files=False)
    corners = [one for one in inspection.problems if one.kind == "xyxy_as_xywh"]
    by_kind = {"xyxy_as_xywh": corners} if corners else {}
    found = _wrong_boxes(as_dataset, results, "predictions", by_kind, inspection.notes)
    index = _category_index(dataset, results, "predictions")
    return [*found, index] if index else found


def _wrong_boxes(
    dataset: Dataset,
    entries: Sequence[Mapping[str, Any]],
    where: Where,
    by_kind: Mapping[str, list[Problem]],
    notes: Sequence[str],
) -> list[_Found]:
    found = []
    if corners := by_kind.get("xyxy_as_xywh"):
        # A note says that nearly all boxes of the file are such.
        places = frozenset(range(len(entries))) if notes else _places(corners)
        details = tuple(one.detail for one in corners[:_MOST_EXAMPLES])
        found.append(_Found("xyxy_as_xywh", where, len(places), details, partial(_as_boxes, places, _from_corners)))
    boxes = [(place, box) for place, one in enumerate(entries) if (box := box_of(one)) is not None]
    small = [(place, box) for place, box in boxes if min(box) >= 0 and 0 < max(box) <= 1.0001]
    if small and len(small) >= _SHARE * len(boxes):
        undo = partial(
            _to_pixels, dataset, frozenset(place for place, _ in small), _fractions([box for _, box in small])
        )
        details = tuple(f"bbox {list(box)}" for _, box in small[:_MOST_EXAMPLES])
        found.append(_Found("normalised_boxes", where, len(small), details, undo))
    return found


def _fractions(boxes: Sequence[Box]) -> Callable[[Box], Box]:
    """Return what turns fractions into x, y, width, height: they may be that, two corners, or a centre and sizes."""
    if all(box[0] + box[2] <= 1.001 and box[1] + box[3] <= 1.001 for box in boxes):
        return lambda box: box
    if all(box[0] < box[2] and box[1] < box[3] for box in boxes):
        return _from_corners
    return lambda box: (box[0] - box[2] / 2, box[1] - box[3] / 2, box[2], box[3])


def _category_index(dataset: Dataset, entries: Sequence[Mapping[str, Any]], where: Where) -> _Found | None:
    """Suspect places instead of ids when an id is unknown and all would do as places."""
    known = list(dataset.names)
    used = {one.get("category_id") for one in entries if is_key(one.get("category_id"))}
    unknown = [one for one in entries if not is_id(one.get("category_id")) or one["category_id"] not in dataset.names]
    if not unknown or not all(is_id(one) and 0 <= one < len(known) for one in used):
        return None
    examples = tuple(f"category_id {one.get('category_id')!r}, ids are {known[0]} to {known[-1]}" for one in unknown)
    undo = partial(_from_places, dict(enumerate(known)))
    return _Found("category_index", where, len(entries), tuple(dict.fromkeys(examples))[:_MOST_EXAMPLES], undo)


def _of_problems(kind: str, by_kind: Mapping[str, list[Problem]], undo: Callable[[Entries], Entries]) -> _Found:
    details = tuple(one.detail for one in by_kind[kind][:_MOST_EXAMPLES])
    return _Found(kind, "annotations", len(by_kind[kind]), details, undo)


def _places(problems: Sequence[Problem]) -> frozenset[int]:
    return frozenset(one.annotation for one in problems if one.annotation is not None)


def _renumber(entries: Entries) -> Entries:
    return [one and {**one, "id": number} for number, one in enumerate(entries, start=1)]


def _drop(places: frozenset[int], entries: Entries) -> Entries:
    return [None if place in places else one for place, one in enumerate(entries)]


def _from_places(ids: Mapping[int, int], entries: Entries) -> Entries:
    return [one and {**one, "category_id": ids.get(one["category_id"], one["category_id"])} for one in entries]


def _from_corners(box: Box) -> Box:
    return box[0], box[1], box[2] - box[0], box[3] - box[1]


def _as_boxes(places: frozenset[int], change: Callable[[Box], Box], entries: Entries) -> Entries:
    return [_changed(one, change) if one and place in places else one for place, one in enumerate(entries)]


def _to_pixels(dataset: Dataset, places: frozenset[int], change: Callable[[Box], Box], entries: Entries) -> Entries:
    def scaled(size: tuple[int, int], box: Box) -> Box:
        x, y, width, height = change(box)
        return x * size[0], y * size[1], width * size[0], height * size[1]

    changed: Entries = []
    for place, one in enumerate(entries):
        image = dataset.image_places.get(one.get("image_id")) if one else None
        size = size_of(dataset.images[image]) if image is not None and place in places else None
        changed.append(_changed(one, partial(scaled, size)) if one and size else one)
    return changed


def _turn(dataset: Dataset, places: frozenset[int], entries: Entries) -> Entries:
    """Turn boxes of a photograph as stored into boxes of it as shown."""
    changed: Entries = []
    for place, one in enumerate(entries):
        image = dataset.image_places.get(one.get("image_id")) if one and place in places else None
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


def _changed(entry: dict[str, Any], change: Callable[[Box], Box]) -> dict[str, Any]:
    """Change the box of an entry, and its area if it was the box's."""
    box = box_of(entry)
    if box is None:
        return entry
    now = change(box)
    area = entry.get("area")
    own = is_number(area) and abs(area - box[2] * box[3]) <= 1e-3 * abs(area)
    return {**entry, "bbox": list(now), **({"area": now[2] * now[3]} if own else {})}


def _truth(dataset: Dataset, entries: Entries) -> GroundTruth:
    """Return the annotations as pycocotools takes them, where it would not have failed."""
    kept: list[dict[str, Any]] = []
    for one in entries:
        box = None if one is None else box_of(one)
        if one is None or box is None or not is_key(one.get("image_id")) or one["image_id"] not in dataset.image_places:
            continue
        if not is_id(one.get("category_id")) or one["category_id"] not in dataset.names:
            continue
        x, y, width, height = box
        area = one.get("area")
        # Not found, whatever is detected; its size stays.
        x = x + _FAR_AWAY if one.get("id") == 0 and is_id(one.get("id")) else x
        kept.append(
            {
                "id": len(kept) + 1,
                "image_id": one["image_id"],
                "category_id": one["category_id"],
                "bbox": [x, y, max(width, 0.0), max(height, 0.0)],
                "area": area if is_number(area) else max(width, 0.0) * max(height, 0.0),
                "iscrowd": one.get("iscrowd") or 0,
            }
        )
    return ground_truth_of({**dataset.document, "annotations": kept}, path=dataset.path)


def _raw_results(path: Path) -> list[dict[str, Any]] | None:
    """Return COCO results as they are; None for other predictions, or where `load_predictions` says what is wrong."""
    file = path / RESULTS_FILE if path.is_dir() else path
    try:
        entries = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    sound = isinstance(entries, list) and all(isinstance(one, dict) for one in entries)
    return entries if sound else None


def _checked(entries: Sequence[dict[str, Any]], truth: GroundTruth, path: Path) -> list[dict[str, Any]]:
    """Return the results of known classes, checked as predictions are."""
    known = [one for one in entries if one.get("category_id") in truth.category_ids]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, path.with_suffix(".json").name)
        file.write_text(json.dumps(known), encoding="utf-8")
        return [*load_predictions(file, truth).results]
