"""Data sets and answers made by the tests."""

import json
from pathlib import Path

import numpy as np
from dethandlers.detections import Category, Detections
from dettools.evaluation.answers import Answer, Failure
from dettools.ground_truth import GroundTruth, load_ground_truth
from PIL import Image

CATEGORIES = (Category(1, "cat", 1), Category(2, "dog", 2))


def data_set(folder: Path, count: int = 12, *, seed: int = 0) -> GroundTruth:
    """Write ``count`` images with three objects each, and their annotations."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(1, count + 1):
        name = f"{number:03}.png"
        Image.new("RGB", (200, 150), (number, 0, 0)).save(folder / "images" / name)
        images.append({"id": number, "file_name": name, "width": 200, "height": 150})
        for corner in rng.uniform(0, 90, (3, 2)).tolist():
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(rng.integers(1, 3)),
                    "bbox": [*corner, 50.0, 40.0],
                    "area": 2000.0,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": one.id, "name": one.name} for one in CATEGORIES]
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return load_ground_truth(path)


def found(truth: GroundTruth, image_id: int, *, jitter: float = 0.0, scores: tuple[float, ...] = (0.9, 0.6, 0.3)):
    """Return the image's objects as detections, each moved by ``jitter`` px."""
    objects = [one for one in truth.annotations if one["image_id"] == image_id]
    boxes = np.array([[x + jitter, y, x + w + jitter, y + h] for x, y, w, h in (one["bbox"] for one in objects)])
    return Detections(
        boxes.astype(np.float32),
        np.array(scores, np.float32),
        np.array([one["category_id"] - 1 for one in objects], np.int64),
    )


def answers(truth: GroundTruth, **how) -> dict[int, Answer]:
    """Return an answer for every image."""
    return {one.id: Answer(one.id, one.file_name, found(truth, one.id, **how)) for one in truth.images}


def failed(answer: Answer) -> Answer:
    """Return the same image without an answer."""
    return Answer(answer.image_id, answer.file_name, failure=Failure("no_worker", "gone", 503))
