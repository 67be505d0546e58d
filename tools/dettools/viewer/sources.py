"""What there is to look at, whichever of annotations, predictions and photographs are given.

annotations + predictions ─► errors are told apart
annotations               ─► the objects
predictions               ─► the detections; image ids are looked for in the names of the files
answers of `detserve predict` ─► the detections; each names its file
images                    ─► the photographs
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detserve.errors import DetserveError

from dettools.ground_truth import GroundTruth, ground_truth_of, load_ground_truth
from dettools.image_files import find_images
from dettools.predictions import RESULTS_FILE, load_predictions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dettools.coco_metrics import IouType

_LAST_NUMBER = re.compile(r"(\d+)\D*$")


class SourcesError(DetserveError):
    """What was given does not tell what to show."""


@dataclass(frozen=True)
class Sources:
    """Images, and what is known about them.

    Attributes:
        title: what it is called, for people.
        ground_truth: images and classes in any case; objects only where there are annotations.
        results: COCO results.
        files: image id to file; images without file are shown by name.
        has_truth: there are annotations; without them nothing is right or wrong.
        has_predictions: there are predictions.
        iou_type: what is compared, ``bbox`` or ``segm``.
        notes: what a person has to know, one sentence each.
    """

    title: str
    ground_truth: GroundTruth
    results: Sequence[Mapping[str, Any]] = field(repr=False)
    files: Mapping[int, Path] = field(repr=False)
    has_truth: bool
    has_predictions: bool
    iou_type: IouType = "bbox"
    notes: tuple[str, ...] = ()


def find_sources(
    predictions: Path | None,
    annotations: Path | None,
    images: Path | None,
    *,
    categories: Sequence[str] | None = None,
    iou_type: IouType | None = None,
) -> Sources | None:
    """Read what is given; None if nothing is.

    Args:
        predictions: COCO results, MMDetection's pickle, the folder of an evaluation, or `detserve predict`'s answers.
        annotations: COCO annotations; without any object they only name images and classes.
        images: folder with the photographs; by default that of the annotations.
        categories: of a pickle, as in `load_predictions`.
        iou_type: what is compared; by default boxes, where all have one.

    Raises:
        SourcesError: predictions that cannot be shown without annotations or images.
        DetserveError: a file that cannot be read, or does not belong to the others.
    """
    if annotations is not None:
        return _annotated(predictions, annotations, images, categories, iou_type)
    if predictions is not None:
        answers = _answers(predictions)
        return _of_results(predictions, images) if answers is None else _of_answers(predictions, answers)
    if images is None:
        return None
    files = dict(enumerate(find_images([str(images)]), start=1))
    truth = _without_objects(images, {number: _below(images, file) for number, file in files.items()}, {})
    return Sources(images.resolve().name, truth, [], files, has_truth=False, has_predictions=False)


def _annotated(
    predictions: Path | None,
    annotations: Path,
    images: Path | None,
    categories: Sequence[str] | None,
    iou_type: IouType | None,
) -> Sources:
    truth = load_ground_truth(annotations)
    found = load_predictions(predictions, truth, categories=categories) if predictions else None
    files, missing = truth.image_files(images or annotations.parent)
    notes = [*truth.notes, *(found.notes if found else ())]
    if missing:
        remedy = "" if images else " Name their folder with --images."
        notes.append(
            f"{len(missing)} of {len(truth.images)} images have no file below {images or annotations.parent}, such as "
            f"{missing[0].file_name}: their boxes are shown without photograph.{remedy}"
        )
    results = found.results if found else ()
    entries = [*truth.annotations, *results]
    boxes = all(one.get("bbox") for one in entries)
    return Sources(
        title=(predictions or annotations).name,
        ground_truth=truth,
        results=results,
        files=files,
        has_truth=bool(truth.annotations),
        has_predictions=found is not None,
        iou_type=iou_type or ("bbox" if boxes else "segm"),
        notes=tuple(notes),
    )


def _of_results(predictions: Path, images: Path | None) -> Sources:
    """COCO results and a folder: an image's id is the last number in its file's name, as in COCO's own."""
    file = predictions / RESULTS_FILE if predictions.is_dir() else predictions
    if file.suffix.lower() in (".pkl", ".pickle"):
        raise SourcesError(
            f"{file}: MMDetection's results name neither images nor classes. Give the annotation file that they were "
            'made with (--annotations); it may have "annotations": [].'
        )
    if images is None:
        raise SourcesError(
            f"{file}: COCO results hold the ids of the images only. Give the annotation file (--annotations), or the "
            "photographs (--images) if their names end in their ids, as COCO's do."
        )
    results = _read_results(file)
    files: dict[int, Path] = {}
    for path in find_images([str(images)]):
        if number := _LAST_NUMBER.search(path.stem):
            identifier = int(number[1])
            if identifier in files:
                raise SourcesError(
                    f"{path} and {files[identifier]} could both be image {identifier}. Give the annotation file "
                    "(--annotations), which names the files."
                )
            files[identifier] = path
    wanted = {one.get("image_id") for one in results}
    if not wanted & set(files):
        raise SourcesError(
            f"{images}: none of the {len(wanted)} images of {file.name} is there: got ids such as "
            f"{next(iter(wanted), None)!r}, expected file names that end in them. Give --annotations."
        )
    ids = {one for one in wanted if isinstance(one, int)} | set(files)
    names = {one: _below(images, files[one]) if one in files else f"image {one}" for one in sorted(ids)}
    classes = sorted({one["category_id"] for one in results if isinstance(one.get("category_id"), int)})
    truth = _without_objects(file, names, {one: f"category {one}" for one in classes})
    found = load_predictions(predictions, truth)
    return Sources(
        file.name, truth, found.results, files, has_truth=False, has_predictions=True, notes=tuple(found.notes)
    )


def _of_answers(path: Path, answers: Sequence[Mapping[str, Any]]) -> Sources:
    names: dict[int, str] = {}
    results: list[dict[str, Any]] = []
    failed = 0
    for number, answer in enumerate(answers, start=1):
        failed += "error" in answer
        for place, one in enumerate(answer.get("detections", ())):
            try:
                results.append(_result(number, one))
                names[results[-1]["category_id"]] = str(one["class_name"])
            except (KeyError, TypeError, ValueError) as error:
                raise SourcesError(
                    f"{path}: {answer['image']}: detections[{place}] is none of `detserve predict`: "
                    f"{type(error).__name__}: {error}"
                ) from None
    files = {number: Path(answer["image"]) for number, answer in enumerate(answers, start=1)}
    truth = _without_objects(path, {number: file.name for number, file in files.items()}, names)
    there = {number: file for number, file in files.items() if file.is_file()}
    notes = [f"{failed} images have an error instead of detections"] if failed else []
    if absent := len(files) - len(there):
        notes.append(f"{absent} of {len(files)} photographs are not where {path.name} says")
    return Sources(path.name, truth, results, there, has_truth=False, has_predictions=True, notes=tuple(notes))


def _result(image_id: int, answered: Mapping[str, Any]) -> dict[str, Any]:
    """Return a detection of the response format as a COCO result."""
    x1, y1, x2, y2 = (float(value) for value in answered["bbox"])
    score = float(answered["score"])
    if not all(map(math.isfinite, (x1, y1, x2, y2, score))):
        raise ValueError("got a number that is not finite")
    return {
        "image_id": image_id,
        "category_id": int(answered["class_label"]),
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "score": score,
        "segmentation": answered.get("segmentation"),
    }


def _answers(path: Path) -> list[dict[str, Any]] | None:
    """Return the lines of `detserve predict`; None if these are other predictions."""
    if path.is_dir():
        return None
    try:
        with path.open("rb") as stream:
            if not stream.read(64).lstrip().startswith(b'{"image"'):
                return None
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise SourcesError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise SourcesError(f"{path}: expected a JSON object a line, as `detserve predict` prints: {error}") from None
    # `predict --json` adds a summary.
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("image"), str)]


def _read_results(file: Path) -> list[dict[str, Any]]:
    try:
        document = json.loads(file.read_bytes())
    except OSError as error:
        raise SourcesError(f"{file}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise SourcesError(f"{file}: expected COCO results or answers of `detserve predict`: {error}") from None
    if isinstance(document, dict) and "annotations" in document:
        raise SourcesError(f"{file}: got COCO annotations, expected predictions. Give it with --annotations.")
    if not isinstance(document, list) or not all(isinstance(one, dict) for one in document):
        raise SourcesError(f"{file}: expected COCO results: a list of detections")
    return document


def _without_objects(path: Path, images: Mapping[int, str], categories: Mapping[int, str]) -> GroundTruth:
    document = {
        "images": [{"id": number, "file_name": name} for number, name in images.items()],
        "annotations": [],
        "categories": [{"id": number, "name": name} for number, name in sorted(categories.items())],
    }
    return ground_truth_of(document, path=path)


def _below(folder: Path, file: Path) -> str:
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else file.name
