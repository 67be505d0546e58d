"""Accuracy under load: what the answers of a level are worth, so that a server that sheds or degrades shows it.

A photograph that was sent five times is five images, each with its own answer and its own copy of the annotations: an
AP over the photographs would let one good answer stand for four that were empty. Scored after the level, from its raw
answers; nothing of it is in the timed path.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from detserve.errors import ClientError, DetserveError

from dettools.benchmark.load import MeasuredLevel
from dettools.benchmark.measurement import Accuracy, Level, Sample
from dettools.coco_metrics import evaluate_coco
from dettools.ground_truth import GroundTruth, base_name, ground_truth_of

Read = Callable[[bytes], list[dict[str, Any]]]
"""The detections of an answer as the default response form has them: ``bbox`` xyxy px, ``score``, ``class_name``."""


class ScoringError(DetserveError):
    """Answers and annotations do not belong together."""


def images_by_name(ground_truth: GroundTruth, names: Sequence[str]) -> dict[str, int]:
    """Return the annotated image of each picture that is to be sent, by its file name.

    Raises:
        ScoringError: a picture without annotations, or whose name several images have.
    """
    by_name: dict[str, list[int]] = {}
    for image in ground_truth.images:
        by_name.setdefault(base_name(image.file_name), []).append(image.id)
    found = {name: by_name.get(Path(name).name, []) for name in names}
    if missing := [name for name, ids in found.items() if not ids]:
        raise ScoringError(
            f"{ground_truth.path} has no annotations of {len(missing)} of {len(names)} images, such as {missing[0]}. "
            "Send only images that are annotated, or leave --annotations out."
        )
    if double := [name for name, ids in found.items() if len(ids) > 1]:
        raise ScoringError(f"{ground_truth.path} has more than one image named {double[0]}; expected one.")
    return {name: ids[0] for name, ids in found.items()}


def check_categories(ground_truth: GroundTruth, detections: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a model whose classes are not those of the annotations, before it is put under load.

    Raises:
        ScoringError: a detection of another class.
    """
    category_of = _Categories(ground_truth)
    if unknown := sorted({str(one.get("class_name")) for one in detections if category_of(one) is None}):
        known = ", ".join(category.name for category in ground_truth.categories[:10])
        raise ScoringError(
            f"The model answers with the class {unknown[0]!r}, expected one of the annotations' ({known}, …). "
            "Give the annotations the model was trained for, or leave --annotations out."
        )


def score_level(measured: MeasuredLevel, ground_truth: GroundTruth, images: Mapping[str, int], read: Read) -> Level:
    """Return the level with its accuracy; an answer that cannot be read becomes the error ``bad_answer``.

    Args:
        measured: with its answers kept.
        ground_truth: the annotations of all pictures.
        images: the annotated image of each picture, from `images_by_name`.
        read: takes an answer apart, the target's.

    Raises:
        ScoringError: no answers were kept, or none of the classes in them is known.
    """
    if measured.answers is None:
        raise ScoringError("The answers of this level were not kept; nothing can be scored.")
    category_of = _Categories(ground_truth)
    results: list[dict[str, Any]] = []
    samples: list[Sample] = []
    dropped: set[str] = set()
    for number, sample in enumerate(measured.level.samples):
        error = sample.error
        if sample.ok:
            try:
                for found in read(measured.answers.body(number)):
                    category_id = category_of(found)
                    if category_id is None:
                        dropped.add(str(found.get("class_name")))
                        continue
                    x1, y1, x2, y2 = (float(value) for value in found["bbox"])
                    box = [x1, y1, x2 - x1, y2 - y1]
                    score = float(found["score"])
                    results.append({"image_id": number + 1, "category_id": category_id, "bbox": box, "score": score})
            except (ClientError, KeyError, TypeError, ValueError):
                error = "bad_answer"
                while results and results[-1]["image_id"] == number + 1:
                    results.pop()
        samples.append(sample if error == sample.error else replace(sample, error=error))
    if dropped and not results:
        raise ScoringError(f"None of the classes in the answers is in the annotations: {', '.join(sorted(dropped))}.")
    return replace(measured.level, samples=tuple(samples), accuracy=_accuracy(samples, results, ground_truth, images))


def _accuracy(
    samples: Sequence[Sample], results: Sequence[dict[str, Any]], ground_truth: GroundTruth, images: Mapping[str, int]
) -> Accuracy | None:
    if not samples:
        return None
    sent = [images[sample.image] for sample in samples]
    expanded = one_image_per_request(ground_truth, sent)
    answered = [number + 1 for number, sample in enumerate(samples) if sample.ok]
    delivered = evaluate_coco(expanded, results)
    whole = len(answered) == len(samples)
    alone = delivered if whole or not answered else evaluate_coco(expanded, results, image_ids=answered)
    return Accuracy(
        ap_answered=alone.ap,
        ap50_answered=alone.ap50,
        ap_delivered=delivered.ap,
        ap50_delivered=delivered.ap50,
        requests=len(samples),
        failed=len(samples) - len(answered),
    )


def one_image_per_request(ground_truth: GroundTruth, sent: Sequence[int]) -> GroundTruth:
    """Return annotations in which each request is an image: the i-th sent has the id i + 1.

    Args:
        sent: ids of the images, in the order of the requests.
    """
    of_image: dict[int, list[Mapping[str, Any]]] = {}
    for annotation in ground_truth.annotations:
        of_image.setdefault(annotation["image_id"], []).append(annotation)
    image_of = {image["id"]: image for image in ground_truth.document["images"]}

    def annotations() -> Iterator[dict[str, Any]]:
        number = 0
        for place, image_id in enumerate(sent, 1):
            for annotation in of_image.get(image_id, []):
                number += 1
                yield {**annotation, "id": number, "image_id": place}

    document = {
        "images": [{**image_of[image_id], "id": place} for place, image_id in enumerate(sent, 1)],
        "annotations": list(annotations()),
        "categories": list(ground_truth.document["categories"]),
    }
    return ground_truth_of(document, path=ground_truth.path, sha256=ground_truth.sha256)


class _Categories:
    """The annotations' category of a detection: by ``category_id`` where the answer has one, else by ``class_name``."""

    def __init__(self, ground_truth: GroundTruth) -> None:
        self._ids = ground_truth.category_ids
        self._by_name = {category.name: category.id for category in ground_truth.categories}

    def __call__(self, detection: Mapping[str, Any]) -> int | None:
        category_id = detection.get("category_id")
        if isinstance(category_id, int):
            return category_id if category_id in self._ids else None
        return self._by_name.get(str(detection.get("class_name")))
