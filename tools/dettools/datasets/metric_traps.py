"""What falsifies the COCO metrics of an annotation file without any error message, and what each such trap costs.

    annotations ─► find_traps ─► AP as the files are · AP with all traps undone but one · AP with all undone

The cost of a trap is what it takes from AP in files that are sound but for it. AP as the files are is what pycocotools
has: it leaves out what is of an unknown image or class, and counts the object with the id 0 as never found.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from dettools.coco_metrics import evaluate_coco
from dettools.datasets.dataset import Dataset, Problem, box_of, is_id, is_key, is_number, read_header, size_of
from dettools.datasets.inspection import KINDS, Inspection, find_problems
from dettools.datasets.trap_repairs import (
    Entries,
    fractions_as_boxes,
    from_corners,
    in_pixels,
    turned_as_shown,
    with_changed_boxes,
    with_ids_of_places,
    with_new_ids,
    without,
)
from dettools.ground_truth import GroundTruth, ground_truth_of
from dettools.predictions import RESULTS_FILE, load_predictions
from dettools.published_figures import published_figures

TRAPS = {
    "id_zero": "an annotation has the id 0: pycocotools counts its object as never found",
    "duplicate_id": "annotations share an id: pycocotools takes the last of them for each, and the others are gone",
    "category_index": "places in the list of classes are written where category ids belong",
    "xyxy_as_xywh": "two corners are written where x, y, width, height belong",
    "normalised_boxes": "boxes are fractions of the image and not pixels",
    "exif_swapped": "boxes are of the photograph as stored, which EXIF turns",
    "duplicate_box": "an object is there twice: the second can never be found",
    "zero_area": "a box without width or height, or with a negative one, can never be found",
}
Where = Literal["annotations", "predictions"]
_MOST_EXAMPLES = 3
_ONLY_TOLD = ("duplicate_image_id", "unknown_image", "unknown_category", "duplicate_category", "bad_box")
_SHARE = 0.95
# No detection reaches so far: a second object with the id 0 is never found either.
_FAR_AWAY = 1e7


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
    inspection = find_problems(dataset)
    found = _in_annotations(dataset, inspection)
    told = set(_ONLY_TOLD) - ({"unknown_category"} if any(one.kind == "category_index" for one in found) else set())
    notes = [
        f"{kind} ({count}): {KINDS[kind].meaning}; nothing tells how to undo it, and figures are wrong by it"
        for kind, count in inspection.counts.items()
        if kind in told
    ]
    if predictions is None:
        traps = tuple(Trap(one.kind, one.where, one.count, one.examples) for one in found)
        return TrapCheck(traps, notes=tuple(notes))
    annotations: Entries = [dict(one) for one in dataset.annotations]
    loaded = load_predictions(predictions, _truth(dataset, annotations, more_classes=_classes_of_results(predictions)))
    results: Entries = [*loaded.results]
    notes += loaded.notes
    if loaded.label_rule is None:
        # COCO results may have traps of their own; pickles hold labels and corners by definition.
        of_results = _in_results(dataset, loaded.results)
        found += of_results
        unknown = sum(one["category_id"] not in dataset.names for one in loaded.results)
        if unknown and not any(one.kind == "category_index" for one in of_results):
            notes.append(f"{unknown} results are of a class that the annotations do not have: they are not evaluated")

    def ap(undone: Sequence[_Found]) -> float:
        sides: dict[Where, Entries] = {"annotations": annotations, "predictions": results}
        for one in undone:
            sides[one.where] = one.undo(sides[one.where])
        against = _truth(dataset, sides["annotations"])
        detections = [one for one in sides["predictions"] if one and one["category_id"] in against.category_ids]
        return _ap_of_pycocotools(against, detections)

    as_they_are = ap([])
    sound = ap(found) if found else as_they_are
    measured = []
    for one in found:
        left = ap([other for other in found if other is not one]) if len(found) > 1 else as_they_are
        measured.append(Trap(one.kind, one.where, one.count, one.examples, left, sound - left))
    return TrapCheck(tuple(measured), as_they_are, sound, tuple(notes))


def _ap_of_pycocotools(truth: GroundTruth, detections: Sequence[dict[str, Any]]) -> float:
    """Return AP with an object of the id 0 counted as never found; of its class, slow pycocotools itself tells it."""
    metrics = evaluate_coco(truth, detections)
    zero = next((one for one in truth.annotations if one["id"] == truth.zero_id), None)
    if zero is None:
        return metrics.ap
    only = truth.with_categories([one.name for one in truth.categories if one.id == zero["category_id"]])
    published = published_figures(only, [one for one in detections if one["category_id"] in only.category_ids], metrics)
    if published is None:
        return metrics.ap
    each = [published["AP"] if one.category_id == zero["category_id"] else one.ap for one in metrics.per_class]
    known = [one for one in each if one is not None]
    return sum(known) / len(known)


def _in_annotations(dataset: Dataset, inspection: Inspection) -> list[_Found]:
    """Return the traps in the order in which they are undone together."""
    by_kind = _by_kind(dataset, inspection)
    boxes = _wrong_boxes(dataset, dataset.annotations, "annotations", by_kind, inspection.notes)
    found = [*boxes]
    if (index := _category_index(dataset, dataset.annotations, "annotations")) is not None:
        found.append(index)
    turned = [
        one for one in by_kind.get("exif_swapped", []) if one.image is not None and _is_turned(dataset, one.image)
    ]
    if there := [place for one in turned for place in dataset.annotations_of.get(one.image or 0, [])]:
        examples = tuple(f"{dataset.name_of(one.image or 0)}: {one.detail}" for one in turned[:_MOST_EXAMPLES])
        found.append(
            _Found(
                "exif_swapped", "annotations", len(there), examples, partial(turned_as_shown, dataset, frozenset(there))
            )
        )
    ids = [kind for kind in ("id_zero", "duplicate_id") if kind in by_kind]
    found += [_of_problems(kind, by_kind, partial(with_new_ids, _places(by_kind[kind]))) for kind in ids]
    if boxes:
        # Fractions all look alike, and corners have sizes of their own.
        changed: Entries = [dict(one) for one in dataset.annotations]
        for one in boxes:
            changed = one.undo(changed)
        sound = replace(dataset, document={**dataset.document, "annotations": changed}, problems=())
        by_kind = _by_kind(sound, find_problems(sound, open_files=False))
    dropped = [kind for kind in ("duplicate_box", "zero_area") if kind in by_kind]
    return [*found, *(_of_problems(kind, by_kind, partial(without, _places(by_kind[kind]))) for kind in dropped)]


def _by_kind(dataset: Dataset, inspection: Inspection) -> dict[str, list[Problem]]:
    by_kind: dict[str, list[Problem]] = {}
    for problem in inspection.problems:
        kind = "zero_area" if problem.kind == "negative_size" else problem.kind
        # A crowd need not be found.
        crowd = problem.annotation is not None and dataset.annotations[problem.annotation].get("iscrowd")
        if not (crowd and kind in ("id_zero", "duplicate_box", "zero_area")):
            by_kind.setdefault(kind, []).append(problem)
    return by_kind


def _is_turned(dataset: Dataset, image: int) -> bool:
    """Whether EXIF swaps the sides of an image; else its width and height only were written in the wrong order."""
    file = dataset.files[image]
    if file is None:
        return False
    header = read_header(file)
    return header.shown != header.stored


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
        found.append(
            _Found("xyxy_as_xywh", where, len(places), details, partial(with_changed_boxes, places, from_corners))
        )
    boxes = [(place, box) for place, one in enumerate(entries) if (box := box_of(one)) is not None]
    small = [(place, box) for place, box in boxes if min(box) >= 0 and 0 < max(box) <= 1.0001]
    if small and len(small) >= _SHARE * len(boxes):
        undo = partial(
            in_pixels, dataset, frozenset(place for place, _ in small), fractions_as_boxes([box for _, box in small])
        )
        details = tuple(f"bbox {list(box)}" for _, box in small[:_MOST_EXAMPLES])
        found.append(_Found("normalised_boxes", where, len(small), details, undo))
    return found


def _category_index(dataset: Dataset, entries: Sequence[Mapping[str, Any]], where: Where) -> _Found | None:
    """Suspect places instead of ids when an id is unknown and all would do as places."""
    known = list(dataset.names)
    used = {one.get("category_id") for one in entries if is_key(one.get("category_id"))}
    unknown = [one for one in entries if not is_id(one.get("category_id")) or one["category_id"] not in dataset.names]
    # Places count from 0, as labels do, or from 1, as with a background before them.
    first = int(len(known) in used)
    if not unknown or not all(is_id(one) and first <= one < len(known) + first for one in used):
        return None
    examples = tuple(f"category_id {one.get('category_id')!r}, ids are {known[0]} to {known[-1]}" for one in unknown)
    undo = partial(with_ids_of_places, dict(enumerate(known, start=first)))
    return _Found("category_index", where, len(entries), tuple(dict.fromkeys(examples))[:_MOST_EXAMPLES], undo)


def _of_problems(kind: str, by_kind: Mapping[str, list[Problem]], undo: Callable[[Entries], Entries]) -> _Found:
    details = tuple(one.detail for one in by_kind[kind][:_MOST_EXAMPLES])
    return _Found(kind, "annotations", len(by_kind[kind]), details, undo)


def _places(problems: Sequence[Problem]) -> frozenset[int]:
    return frozenset(one.annotation for one in problems if one.annotation is not None)


def _truth(dataset: Dataset, entries: Entries, *, more_classes: Sequence[int] = ()) -> GroundTruth:
    """Return the annotations as pycocotools takes them, where it would not have failed."""
    # It keeps the last annotation of an id, and loads it for each that has the id.
    by_id = {one["id"]: one for one in entries if one and is_key(one.get("id"))}
    kept: list[dict[str, Any]] = []
    has_zero = False
    for one in entries:
        if one is None or not _is_evaluated(dataset, one):
            continue
        taken = by_id.get(one["id"], one) if is_key(one.get("id")) else one
        box = box_of(taken)
        if box is None or not _is_evaluated(dataset, taken):
            continue
        x, y, width, height = box
        area, crowd = taken.get("area"), bool(taken.get("iscrowd"))
        zero = taken.get("id") == 0 and not crowd
        if zero and has_zero:
            x += _FAR_AWAY
        kept.append(
            {
                "id": 0 if zero and not has_zero else len(kept) + 1,
                "image_id": taken["image_id"],
                "category_id": taken["category_id"],
                "bbox": [x, y, max(width, 0.0), max(height, 0.0)],
                "area": area if is_number(area) else max(width, 0.0) * max(height, 0.0),
                "iscrowd": int(crowd),
            }
        )
        has_zero = has_zero or zero
    # An odd size or name, which is refused elsewhere, changes no AP of boxes.
    images = [
        {"id": one.get("id"), "file_name": dataset.name_of(place), "width": size[0], "height": size[1]}
        for place, one in enumerate(dataset.images)
        for size in [size_of(one) or (0, 0)]
    ]
    unknown = {one: str(one) for one in more_classes if one not in dataset.names}
    categories = [{"id": one, "name": name} for one, name in {**dataset.names, **unknown}.items()]
    return ground_truth_of({"images": images, "annotations": kept, "categories": categories}, path=dataset.path)


def _is_evaluated(dataset: Dataset, entry: Mapping[str, Any]) -> bool:
    """Whether an annotation has a box and is of an image and a class that the file has."""
    known = is_key(entry.get("image_id")) and entry["image_id"] in dataset.image_places
    return (
        known
        and is_id(entry.get("category_id"))
        and entry["category_id"] in dataset.names
        and box_of(entry) is not None
    )


def _classes_of_results(path: Path) -> list[int]:
    """Return the category ids of COCO results; none of other predictions, whose faults others tell."""
    file = path / RESULTS_FILE if path.is_dir() else path
    try:
        entries = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    ids = [one.get("category_id") for one in entries if isinstance(one, dict)] if isinstance(entries, list) else []
    return sorted({one for one in ids if is_id(one)})
