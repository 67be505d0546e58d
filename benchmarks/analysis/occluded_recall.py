"""occluded-recall beside the original algorithm, on a synthetic set of COCO val's size; writes its section.

    .venv/bin/python benchmarks/analysis/occluded_recall.py            about 5 minutes; benchmarks/ANALYSIS.md
    .venv/bin/python benchmarks/analysis/occluded_recall.py --quick    small, writes nothing: only to see that it runs

The original algorithm is written from its description: every predicted mask is decoded to a bitmap of the whole image
and kept; each item of a subset is decoded and compared, bitmap by bitmap, with the detections of its class in the order
of their scores, until one overlaps enough. All bitmaps of 5,000 images would need tens of GB: it is measured on a
sample.
"""

import argparse
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from dettools.analysis.occluded_recall import OccludedRecall
from dettools.analysis.occlusion import OcclusionSubsets, annotation_rle, make_subsets
from dettools.ground_truth import GroundTruth, ground_truth_of
from hotcoco import mask as rle_masks
from section import machine, spread, write_section

IMAGES, OBJECTS, DETECTIONS, CATEGORIES, SAMPLE, ROUNDS = 5_000, 7, 40, 80, 100, 5
WIDTH, HEIGHT = 640, 480
SCORE_THRESHOLD, IOU_THRESHOLD = 0.3, 0.75


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    images, sample, rounds = (30, 10, 1) if args.quick else (IMAGES, SAMPLE, ROUNDS)
    truth, results = synthetic_set(images)
    start = time.perf_counter()
    subsets = make_subsets(truth)
    making = time.perf_counter() - start
    items = len(subsets.occluded) + len(subsets.separated)
    start = time.perf_counter()
    ours(truth, subsets, results)
    whole = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    part = truth.restricted_to([image.id for image in truth.images[:sample]])
    few = [one for one in results if one["image_id"] in part.image_ids]
    mine, theirs = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        found = ours(part, subsets, few)
        mine.append(time.perf_counter() - start)
        start = time.perf_counter()
        reference = original(part, subsets, few)
        theirs.append(time.perf_counter() - start)
    ratio = np.median(theirs) / np.median(mine)
    here = sum(one.image_id in part.image_ids for one in (*subsets.occluded, *subsets.separated))
    about = (
        f"{images:,} images of {WIDTH} × {HEIGHT}, {len(truth.annotations):,} masks of {CATEGORIES} classes, "
        f"{len(results):,} detections with masks (seeded); {items:,} objects in the two subsets. Masks only, IoU "
        f"{IOU_THRESHOLD}, scores from {SCORE_THRESHOLD}. Side by side on the first {sample} images ({len(few):,} "
        f"detections, {here} objects of the subsets), medians of {rounds} turns with the smallest and largest."
    )
    rows = [
        "| algorithm | time | found |",
        "|---|---|---|",
        f"| ours, {sample} images | {spread(mine, ' s', 3)} | {found} |",
        f"| original, {sample} images | {spread(theirs, ' s', 3)} | {reference} |",
        f"| ours, {images:,} images | {whole:.1f} s | |",
        f"| original, {images:,} images | {np.median(theirs) * images / sample:,.0f} s (scaled) | |",
    ]
    after = (
        f"Ratio **{ratio:.0f} ×** (goal: 10 ×). The original's `found` may be larger: one detection finds several "
        f"objects there. Making the subsets of all {images:,} images took {making:.0f} s, which the original does not "
        f"do; the process held at most {memory:.2f} GB up to there, data set included."
    )
    text = [about, "", *rows, "", after, "", machine()]
    if args.quick:
        print("\n".join(text))
    else:
        write_section("occluded-recall", text)
    return 0


def synthetic_set(images: int) -> tuple[GroundTruth, list[dict[str, Any]]]:
    """Ellipses that hide one another; most are predicted, a little moved, among false positives of low scores."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []

    def ellipse() -> np.ndarray:
        x, y = random.uniform(0, WIDTH), random.uniform(0, HEIGHT)
        a, b = np.exp(random.normal(np.log(45), 0.7, 2)).clip(6, 250)
        left, right = int(max(x - a, 0)), int(min(x + a + 1, WIDTH))
        top, bottom = int(max(y - b, 0)), int(min(y + b + 1, HEIGHT))
        drawn = np.zeros((HEIGHT, WIDTH), np.uint8)
        part = (slice(top, bottom), slice(left, right))
        drawn[part] = ((columns[part] - x) / a) ** 2 + ((rows[part] - y) / b) ** 2 <= 1
        return drawn

    for image_id in range(1, images + 1):
        drawn = [ellipse() for _ in range(OBJECTS)]
        hidden = np.zeros((HEIGHT, WIDTH), bool)
        visible = []
        for one in reversed(drawn):
            visible.append(one & ~hidden)
            hidden |= one.astype(bool)
        shapes = [one for one in visible if one.any()]
        found = []
        for one in shapes:
            category = int(random.integers(1, CATEGORIES + 1))
            rle = plain(rle_masks.encode(one))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": np.asarray(rle_masks.to_bbox(rle)).tolist(),
                    "area": int(one.sum()),
                    "iscrowd": 0,
                    "segmentation": rle,
                }
            )
            if random.random() < 0.8:
                moved = np.roll(one, tuple(random.integers(-2, 3, 2)), (0, 1))
                found.append((category, random.uniform(0.3, 1), moved))
        while len(found) < DETECTIONS:
            # As a detector leaves them: near objects, of any class, mostly of low scores.
            moved = np.roll(shapes[int(random.integers(len(shapes)))], tuple(random.integers(-40, 41, 2)), (0, 1))
            found.append((int(random.integers(1, CATEGORIES + 1)), random.beta(1, 4), moved))
        for category, score, one in found:
            rle = plain(rle_masks.encode(one))
            box = np.asarray(rle_masks.to_bbox(rle)).tolist()
            results.append(
                {"image_id": image_id, "category_id": category, "score": float(score), "bbox": box, "segmentation": rle}
            )
    names = [{"id": one, "name": str(one)} for one in range(1, CATEGORIES + 1)]
    entries = [{"id": one, "file_name": f"{one}.jpg", "width": WIDTH, "height": HEIGHT} for one in range(1, images + 1)]
    document = {"images": entries, "categories": names, "annotations": annotations}
    return ground_truth_of(document, path=Path("synthetic.json")), results


def plain(rle: dict[str, Any]) -> dict[str, Any]:
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def ours(truth: GroundTruth, subsets: OcclusionSubsets, results: list[dict[str, Any]]) -> int:
    recall = OccludedRecall(
        truth, subsets, score_threshold=SCORE_THRESHOLD, iou_threshold=IOU_THRESHOLD, iou_types=["segm"]
    )
    recall.update_results(results)
    result = recall.result()
    return result.of("occluded").all.found + result.of("separated").all.found


def original(truth: GroundTruth, subsets: OcclusionSubsets, results: list[dict[str, Any]]) -> int:
    detections: dict[int, list[tuple[float, int, np.ndarray]]] = {image.id: [] for image in truth.images}
    for one in results:
        bitmap = rle_masks.decode(one["segmentation"])
        detections[one["image_id"]].append((one["score"], one["category_id"], bitmap))
    for found in detections.values():
        found.sort(key=lambda one: -one[0])
    by_id = {one["id"]: one for one in truth.annotations}
    correct = 0
    for item in (*subsets.occluded, *subsets.separated):
        if item.image_id not in detections:
            continue
        target = rle_masks.decode(annotation_rle(by_id[item.annotation_id], HEIGHT, WIDTH))
        for score, category, bitmap in detections[item.image_id]:
            if score < SCORE_THRESHOLD:
                break
            if category != item.category_id:
                continue
            areas = np.count_nonzero(bitmap == 1) + np.count_nonzero(target == 1)
            inside = np.count_nonzero(np.logical_and(bitmap == 1, target == 1))
            if inside / (areas - inside) >= IOU_THRESHOLD:
                correct += 1
                break
    return correct


if __name__ == "__main__":
    sys.exit(main())
