"""A set of COCO val's size for the benchmarks of the error tools: seeded, and with every error a detector makes.

Classes are as uneven as COCO's (the commonest has a third of all objects) and stand in 12 supercategories. An object is
mostly found, by a moved box, sometimes twice or as a class of its supercategory; the rest of the detections lie badly,
on other objects, or on background, with the low scores that a detector gives them.
"""

from pathlib import Path
from typing import Any

import numpy as np
from dettools.ground_truth import GroundTruth, ground_truth_of

WIDTH, HEIGHT = 640, 480
SUPERCATEGORIES = 12


def synthetic_set(
    images: int = 5_000, objects: int = 36_000, detections: int = 200_000, classes: int = 80, seed: int = 0
) -> tuple[GroundTruth, list[dict[str, Any]]]:
    """Return annotations with boxes, 1 % of them crowds, and COCO results of them."""
    random = np.random.default_rng(seed)
    shares = 1 / np.arange(1, classes + 1)
    of_class = random.choice(classes, objects, p=shares / shares.sum())
    of_image = np.sort(random.integers(images, size=objects))
    boxes = _random_boxes(random, objects)
    crowd = random.random(objects) < 0.01
    place, label, found, score = _found(random, of_class, np.flatnonzero(~crowd), boxes, classes)
    kept = min(len(place), detections)
    image, label, found, score = of_image[place[:kept]], label[:kept], found[:kept], score[:kept]
    rest = detections - kept
    # Half of the others lie on or near objects, half anywhere; each image gets some.
    near = random.integers(objects, size=rest // 2)
    image = np.concatenate([image, of_image[near], random.integers(images, size=rest - len(near))])
    label = np.concatenate([label, random.choice(classes, rest, p=shares / shares.sum())])
    loose = _moved(random, boxes[near], 0.35)
    found = np.concatenate([found, loose, _random_boxes(random, rest - len(near))])
    score = np.concatenate([score, random.beta(1, 6, rest)])
    document = {
        "images": [
            {"id": one, "file_name": f"{one:012}.jpg", "width": WIDTH, "height": HEIGHT} for one in range(1, images + 1)
        ],
        "categories": [
            {"id": one + 1, "name": f"class {one + 1}", "supercategory": f"group {one % SUPERCATEGORIES + 1}"}
            for one in range(classes)
        ],
        "annotations": [
            {
                "id": place + 1,
                "image_id": int(of_image[place]) + 1,
                "category_id": int(of_class[place]) + 1,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": int(crowd[place]),
            }
            for place, box in enumerate(boxes.round(2).tolist())
        ],
    }
    results = [
        {"image_id": one + 1, "category_id": kind + 1, "bbox": box, "score": value}
        for one, kind, box, value in zip(
            image.tolist(), label.tolist(), found.round(2).tolist(), score.round(5).tolist(), strict=True
        )
    ]
    order = random.permutation(len(results)).tolist()
    return ground_truth_of(document, path=Path("synthetic.json")), [results[one] for one in order]


def _found(
    random: np.random.Generator, of_class: np.ndarray, single: np.ndarray, boxes: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return object, class, box and score of the detections of objects: right, duplicate, wrong class, badly placed."""
    kinds = ((0.8, 0.04, 2.5, False), (0.2, 0.06, 1.2, False), (0.12, 0.05, 1.5, True), (0.15, 0.2, 1.5, False))
    places, labels, found, scores = [], [], [], []
    for share, jitter, certainty, wrong in kinds:
        place = single[random.random(len(single)) < share]
        label = of_class[place]
        if wrong:
            # Of the same supercategory two times in three.
            step = np.where(random.random(len(place)) < 2 / 3, SUPERCATEGORIES, random.integers(1, classes, len(place)))
            label = (label + step) % classes
        places.append(place)
        labels.append(label)
        found.append(_moved(random, boxes[place], jitter))
        scores.append(random.beta(certainty, 1.2, len(place)))
    return np.concatenate(places), np.concatenate(labels), np.concatenate(found), np.concatenate(scores)


def _random_boxes(random: np.random.Generator, count: int) -> np.ndarray:
    sizes = np.exp(random.normal(np.log(55), 0.9, (count, 2))).clip(4, [WIDTH - 1, HEIGHT - 1])
    corners = random.random((count, 2)) * ([WIDTH, HEIGHT] - sizes)
    return np.hstack([corners, sizes])


def _moved(random: np.random.Generator, boxes: np.ndarray, jitter: float) -> np.ndarray:
    """Move and stretch boxes by a share of their sides; they stay in the image."""
    sides = np.tile(boxes[:, 2:], 2)
    moved = boxes + random.normal(0, jitter, boxes.shape) * sides
    moved[:, 2:] = moved[:, 2:].clip(2)
    ends = (moved[:, :2] + moved[:, 2:]).clip(2, [WIDTH, HEIGHT])
    starts = moved[:, :2].clip(0, ends - 2)
    return np.hstack([starts, ends - starts])
