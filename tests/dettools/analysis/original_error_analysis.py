"""MMDetection's coco_error_analysis.py, written from its description: what ours is compared with."""

import copy

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def original_stacks(document, results, iou_type="bbox", areas=None):
    """Return the ``(7, 101, K, 4)`` array that the original draws, classes by ascending id."""
    truth, found = indexed(document), detections(document, results, iou_type)
    evaluator = evaluated(truth, found, iou_type, [0.75, 0.5, 0.1], areas)
    curves = evaluator.eval["precision"][..., 0]
    curves = np.vstack([curves, np.zeros((4, *curves.shape[1:]))])
    for place, category in enumerate(truth.getCatIds()):
        curves[3, :, place], curves[4, :, place] = one_class(truth, found, place, category, iou_type, areas)
        curves[curves == -1] = 0
        curves[5, :, place] = curves[4, :, place] > 0
        curves[6, :, place] = 1.0
    return curves


def one_class(truth, found, place, category, iou_type, areas=None):
    """Return the Sim and Oth curves of one class: two evaluations of copied annotations."""
    supercategory = truth.loadCats(category)[0]["supercategory"]
    similar = truth.getCatIds(supNms=[supercategory])
    mine = copy.deepcopy(found)
    mine.dataset["annotations"] = [one for one in mine.dataset["annotations"] if one["category_id"] == category]
    mine.createIndex()
    curves = []
    for others in (similar, truth.getCatIds()):
        relabelled = copy.deepcopy(truth)
        for one in relabelled.dataset["annotations"]:
            if one["category_id"] in others and one["category_id"] != category:
                one.update(ignore=1, iscrowd=1, category_id=category)
        relabelled.createIndex()
        evaluator = evaluated(relabelled, copy.deepcopy(mine), iou_type, [0.1], areas)
        curves.append(evaluator.eval["precision"][0, :, place, :, 0])
    return curves


def evaluated(truth, found, iou_type, thresholds, areas):
    evaluator = COCOeval(truth, found, iou_type)
    evaluator.params.iouThrs = np.array(thresholds)
    evaluator.params.maxDets = [100]
    if areas:
        small, medium, large = areas
        evaluator.params.areaRng = [[0, large], [0, small], [small, medium], [medium, large]]
    evaluator.evaluate()
    evaluator.accumulate()
    return evaluator


def indexed(document):
    truth = COCO()
    truth.dataset = copy.deepcopy(document)
    truth.createIndex()
    return truth


def detections(document, results, iou_type):
    """Return results as `COCO.loadRes` makes them, the area being that of what is compared."""
    from pycocotools import mask

    entries = [{**one, "id": place + 1, "iscrowd": 0} for place, one in enumerate(results)]
    for one in entries:
        one["area"] = one["bbox"][2] * one["bbox"][3] if iou_type == "bbox" else float(mask.area(one["segmentation"]))
    return indexed({**document, "annotations": entries})
