"""confusion-matrix beside the original algorithm, on a synthetic set of COCO val's size; writes its section.

    .venv/bin/python benchmarks/analysis/confusion_matrix.py            about 3 minutes; benchmarks/ANALYSIS.md
    .venv/bin/python benchmarks/analysis/confusion_matrix.py --quick    small, writes nothing: only to see that it runs

The original algorithm is written from its description: of each image and each predicted class the overlaps with all
objects, box by box of the shorter list, then a loop over detections and objects. It begins with the detections of each
image as PyTorch tensors, as its pickle has them; ours begins with COCO results, one dict a detection. Measured is CPU
time, which other work on the machine moves less than the time of day.
"""

import argparse
import resource
import sys
import time
from typing import Any

import numpy as np
import torch
from dettools.analysis.confusion import confusion_of, sweep
from dettools.analysis.overlaps import find_overlaps
from dettools.ground_truth import GroundTruth
from section import machine, spread, write_section
from synthetic import synthetic_set

SCORE_THRESHOLD, IOU_THRESHOLD, GOAL = 0.3, 0.5, 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    size = {"images": 100, "objects": 720, "detections": 4_000} if args.quick else {}
    torch.set_num_threads(1)
    truth, results = synthetic_set(**size)
    arrays = by_image(truth, results)
    mine, theirs = [], []
    for _ in range(1 if args.quick else 5):
        start = time.process_time()
        counts = ours(truth, results)
        mine.append(time.process_time() - start)
        start = time.process_time()
        reference = original(truth, arrays)
        theirs.append(time.process_time() - start)
    start = time.process_time()
    sweep(find_overlaps(truth, results), iou_threshold=IOU_THRESHOLD)
    sweeping = time.process_time() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    ratio = np.median(theirs) / np.median(mine)
    about = (
        f"{len(truth.images):,} images, {len(truth.annotations):,} boxes of {len(truth.categories)} classes, "
        f"{len(results):,} detections (seeded); scores from {SCORE_THRESHOLD}, IoU {IOU_THRESHOLD}. Medians of "
        f"{len(mine)} turns with the smallest and largest, ours and the original's in turn."
    )
    rows = [
        "| algorithm | CPU time | counted for objects | objects |",
        "|---|---|---|---|",
        f"| ours | {spread(mine, ' s')} | {counts[:-1].sum():,} | {truth.objects:,} |",
        f"| original | {spread(theirs, ' s')} | {reference[:-1].sum():,} | {truth.objects:,} |",
    ]
    verdict = (
        f"**{ratio:.1f} ×** as fast (goal: {GOAL} ×). With the sweep over 19 score thresholds, from all detections: "
        f"{sweeping:.2f} s. Largest memory of the whole program: {memory:.2f} GB. The original counts confused objects "
        "twice, duplicates as found, and crowds: hence its larger sum."
    )
    text = [about, "", *rows, "", verdict, "", machine()]
    if args.quick:
        print("\n".join(text))
    else:
        write_section("confusion-matrix", text)
    return 0


def ours(truth: GroundTruth, results: list[dict[str, Any]]) -> np.ndarray:
    # A detection below the threshold takes no part, so it need not be compared either.
    kept = [one for one in results if one["score"] >= SCORE_THRESHOLD]
    overlaps = find_overlaps(truth, kept)
    return confusion_of(overlaps, iou_threshold=IOU_THRESHOLD, score_threshold=SCORE_THRESHOLD).counts


Image = tuple[list[tuple[int, list[float]]], torch.Tensor, torch.Tensor, torch.Tensor]


def by_image(truth: GroundTruth, results: list[dict[str, Any]]) -> list[Image]:
    """Return of each image its objects (label, xyxy), and labels, scores and boxes xyxy of its detections."""
    place = {one.id: at for at, one in enumerate(truth.categories)}
    objects: dict[int, list[tuple[int, list[float]]]] = {one.id: [] for one in truth.images}
    found: dict[int, list[tuple[int, float, list[float]]]] = {one.id: [] for one in truth.images}
    for one in truth.annotations:
        objects[one["image_id"]].append((place[one["category_id"]], corners(one["bbox"])))
    for one in results:
        found[one["image_id"]].append((place[one["category_id"]], one["score"], corners(one["bbox"])))
    return [
        (
            objects[image.id],
            torch.tensor([label for label, _, _ in found[image.id]], dtype=torch.int64),
            torch.tensor([score for _, score, _ in found[image.id]], dtype=torch.float32),
            torch.tensor([box for _, _, box in found[image.id]], dtype=torch.float32).reshape(-1, 4),
        )
        for image in truth.images
    ]


def corners(box: list[float]) -> list[float]:
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def original(truth: GroundTruth, images: list[Image]) -> np.ndarray:
    classes = len(truth.categories)
    counts = np.zeros((classes + 1, classes + 1))
    for objects, labels, scores, boxes in images:
        true_positives = np.zeros(len(objects))
        object_labels = np.array([label for label, _ in objects], np.int64)
        object_boxes = np.array([box for _, box in objects], np.float32).reshape(-1, 4)
        for label in np.unique(labels.numpy()):
            mask = labels == int(label)
            ious = bbox_overlaps(boxes[mask].numpy(), object_boxes)
            for row, score in enumerate(scores[mask].numpy()):
                matches = 0
                if score < SCORE_THRESHOLD:
                    continue
                for column, target in enumerate(object_labels):
                    if ious[row, column] >= IOU_THRESHOLD:
                        matches += 1
                        if target == label:
                            true_positives[column] += 1
                        counts[target, label] += 1
                if matches == 0:
                    counts[-1, label] += 1
        for found, target in zip(true_positives, object_labels, strict=True):
            if found == 0:
                counts[target, -1] += 1
    return counts.astype(int)


def bbox_overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """IoU of all pairs, one box of the shorter list at a time."""
    ious = np.zeros((len(first), len(second)), np.float32)
    if ious.size == 0:
        return ious
    exchange = len(first) > len(second)
    if exchange:
        first, second, ious = second, first, ious.T
    areas = (first[:, 2] - first[:, 0]) * (first[:, 3] - first[:, 1])
    others = (second[:, 2] - second[:, 0]) * (second[:, 3] - second[:, 1])
    for place, box in enumerate(first):
        left, top = np.maximum(box[0], second[:, 0]), np.maximum(box[1], second[:, 1])
        right, bottom = np.minimum(box[2], second[:, 2]), np.minimum(box[3], second[:, 3])
        inside = np.maximum(right - left, 0) * np.maximum(bottom - top, 0)
        ious[place] = inside / np.maximum(areas[place] + others - inside, 1e-6)
    return ious.T if exchange else ious


if __name__ == "__main__":
    sys.exit(main())
