"""Random annotations and detections with everything that COCO evaluation treats apart."""

from pathlib import Path
from typing import Any

import numpy as np
from dettools.ground_truth import GroundTruth, ground_truth_of

Document = dict[str, Any]
Results = list[dict[str, Any]]


def scenes(
    seed: int, *, images: int = 12, classes: int = 4, ties: bool = False, masks: bool = False
) -> tuple[Document, Results]:
    """Return annotations with crowds, empty images, a class without objects, all sizes; and detections of them."""
    random = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    results: Results = []
    for image in range(images):
        # The last image is empty, and so is the last class.
        for _ in range(0 if image == images - 1 else int(random.integers(0, 7))):
            width, height = np.exp(random.uniform(np.log(8), np.log(300), 2))
            box = [float(random.uniform(0, 640 - width)), float(random.uniform(0, 480 - height)), width, height]
            box = [round(float(value), 1) for value in box]
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image * 3,
                "category_id": int(random.integers(1, classes)) * 2,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": int(random.random() < 0.15),
            }
            annotations.append(annotation)
            for _ in range(int(random.integers(0, 4))):
                moved = [value + float(random.normal(0, 0.08)) * box[2] for value in box]
                category = annotation["category_id"] if random.random() < 0.9 else 2
                results.append(detection(random, image * 3, category, moved, ties=ties))
        for _ in range(int(random.integers(0, 5))):
            box = [*random.uniform(0, 300, 2).tolist(), *random.uniform(5, 200, 2).tolist()]
            results.append(detection(random, image * 3, int(random.integers(1, classes + 1)) * 2, box, ties=ties))
    document = {
        "images": [{"id": one * 3, "file_name": f"{one}.jpg", "width": 640, "height": 480} for one in range(images)],
        "annotations": annotations,
        "categories": [{"id": (one + 1) * 2, "name": f"class {one}"} for one in range(classes)],
    }
    if masks:
        for one in (*annotations, *results):
            one["segmentation"] = ellipse(one["bbox"])
    return document, results


def detection(
    random: np.random.Generator, image: int, category: int, box: list[float], *, ties: bool
) -> dict[str, Any]:
    score = float(random.random())
    box = [box[0], box[1], abs(box[2]), abs(box[3])]
    return {"image_id": image, "category_id": category, "bbox": box, "score": round(score, 1) if ties else score}


def ellipse(box: list[float]) -> dict[str, Any]:
    from pycocotools import mask

    y, x = np.mgrid[:480, :640]
    inside = ((x - box[0] - box[2] / 2) / (box[2] / 2 + 1)) ** 2 + ((y - box[1] - box[3] / 2) / (box[3] / 2 + 1)) ** 2
    rle = mask.encode(np.asfortranarray(inside <= 1, np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def checked(document: object) -> GroundTruth:
    return ground_truth_of(document, path=Path("scenes.json"))
